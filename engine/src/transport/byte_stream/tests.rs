use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::memory::PageRange;
use crate::testing::TestMemory;

/// Bytes to be read, in small reads; notes for how many it is asked at most.
struct Script {
    bytes: Mutex<Vec<u8>>,
    most: Arc<AtomicUsize>,
}

impl ByteStream for Script {
    fn read(&self, into: &mut [u8], _: Option<Duration>) -> io::Result<usize> {
        self.most.fetch_max(into.len(), Ordering::SeqCst);
        let mut bytes = self.bytes.lock().unwrap();
        let len = into.len().min(bytes.len()).min(16 << 10);
        into[..len].copy_from_slice(&bytes[..len]);
        bytes.drain(..len);
        Ok(len)
    }

    fn write(&self, bytes: &[u8], _: Option<Duration>) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn shut_down(&self) {}
}

/// A run of 16 MiB is announced: the buffer that it costs is a quarter of a MiB, and its pages are
/// in their place all the same.
#[test]
fn a_long_run_costs_a_small_buffer() {
    const PAGES: u32 = 4096;
    let (here, there) = (TestMemory::new(&[PAGES.into()]), TestMemory::new(&[PAGES.into()]));
    let range = PageRange { region: 0, first_page: 0, pages: PAGES };
    here.fill_page(0, 0, 1);
    here.fill_page(0, 70, 2);
    here.fill_page(0, 4095, 3);
    let runs = [Run { range, kind: RunKind::Data }];
    let (mut bytes, mut pages) = (Vec::new(), Vec::new());
    stream::encode_batch(1, &runs, false, &mut bytes);
    here.memory().copy_out(range, &mut pages).unwrap();
    bytes.extend(pages);
    let most = Arc::new(AtomicUsize::new(0));
    let silent = || Script { bytes: Mutex::default(), most: Arc::default() };
    let data = Script { bytes: Mutex::new(bytes), most: Arc::clone(&most) };
    let mut link = ByteStreamLink::new("script", silent(), vec![data]);
    link.register(there.memory()).unwrap();
    let mut receivers = link.open_receivers(1, Duration::ZERO).unwrap();
    assert!(matches!(receivers[0].receive().unwrap(), Received::Batch(_)));
    assert_eq!(here.first_difference(&there), None);
    assert!(most.load(Ordering::SeqCst) <= 256 << 10, "{most:?}");
}

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;
use crate::pages::memory::PageRange;
use crate::testing::TestMemory;
use crate::transport::{Received, Run, RunKind, stream};

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

/// An endless stream of batches of a MiB, in reads of so many bytes at most.
struct Batches {
    at: Mutex<(u64, Vec<u8>, usize)>,
    most_bytes: usize,
    last: u64,
}

const BATCH_PAGES: u32 = 256;

impl ByteStream for Batches {
    fn read(&self, into: &mut [u8], _: Option<Duration>) -> io::Result<usize> {
        let mut at = self.at.lock().unwrap();
        let (ticket, head, read) = &mut *at;
        let batch_bytes = head.len() + BATCH_PAGES as usize * 4096;
        if *read == batch_bytes || *ticket == 0 {
            (*ticket, *read) = (*ticket + 1, 0);
            let range = PageRange { region: 0, first_page: 0, pages: BATCH_PAGES };
            let runs = [Run { range, kind: RunKind::Data }];
            stream::encode_batch(*ticket, &runs, false, head);
            if *ticket > self.last {
                stream::encode_end(head);
            }
        }
        let len = into.len().min(self.most_bytes);
        let len = if *read < head.len() {
            let len = len.min(head.len() - *read);
            into[..len].copy_from_slice(&head[*read..*read + len]);
            len
        } else {
            let len = len.min(head.len() + BATCH_PAGES as usize * 4096 - *read);
            into[..len].fill(7);
            len
        };
        *read += len;
        Ok(len)
    }

    fn write(&self, bytes: &[u8], _: Option<Duration>) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn shut_down(&self) {}
}

/// What receiving costs beside the stream's own reads, which here write a constant.
#[test]
#[ignore = "prints times and checks nothing: ci/test measure"]
fn measure_receiving_by_the_size_of_reads() {
    const GIB: u64 = 4;
    for most_bytes in [16 << 10, 64 << 10, 256 << 10, 1 << 20] {
        let there = TestMemory::new(&[BATCH_PAGES.into()]);
        there.fill(1);
        let batches = |last| Batches { at: Mutex::default(), most_bytes, last };
        let mut link = ByteStreamLink::new("batches", batches(0), vec![batches(GIB << 10)]);
        link.register(there.memory()).unwrap();
        let mut receivers = link.open_receivers(1, Duration::ZERO).unwrap();
        let began = Instant::now();
        while let Received::Batch(_) = receivers[0].receive().unwrap() {}
        let rate = (GIB << 30) as f64 / began.elapsed().as_secs_f64() / 1e9;
        eprintln!("reads of {} KiB: {rate:.2} GB/s", most_bytes >> 10);
    }
}

//! Guest memory of this side, registered chunk by chunk: all at once, or while pages flow.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Instant;

use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry::transport::{Registration, TransportError};

use crate::pipe::Transfer;
use crate::table::{Entry, Piece, find};
use crate::verbs::{Access, Context, MemoryRegion, ProtectionDomain, Span};

/// Threads that register all at once. The kernel pins pages one by one, so two halve the time; more
/// compete with the guest.
const THREADS: usize = 2;

/// One memory region of guest memory, or what is to become one.
#[derive(Debug)]
struct Chunk {
    region: u16,
    first_page: u64,
    pages: u64,
    address: u64,
    mr: OnceLock<MemoryRegion>,
    /// Held by who registers it; others wait for him.
    work: Mutex<()>,
}

/// Guest memory, cut into chunks of which each is registered once, when somebody wants it.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) memory: Arc<GuestMemory>,
    pd: Arc<ProtectionDomain>,
    access: Access,
    /// By region and first page, without gaps.
    chunks: Vec<Chunk>,
    /// The chunk that is registered next by those who go ahead, in order.
    next: AtomicUsize,
}

impl Registered {
    /// Nothing is registered yet.
    pub(crate) fn new(
        pd: &Arc<ProtectionDomain>,
        memory: &Arc<GuestMemory>,
        chunk_bytes: u64,
        access: Access,
    ) -> Self {
        let at_once = chunk_bytes / PAGE_BYTES;
        let mut chunks = Vec::new();
        for (region, raw) in (0_u16..).zip(memory.regions()) {
            let address = raw.host_addr.expose_provenance() as u64;
            let mut first_page = 0;
            while first_page < raw.layout.pages() {
                let pages = at_once.min(raw.layout.pages() - first_page);
                chunks.push(Chunk {
                    region,
                    first_page,
                    pages,
                    address: address + first_page * PAGE_BYTES,
                    mr: OnceLock::new(),
                    work: Mutex::new(()),
                });
                first_page += pages;
            }
        }
        let next = AtomicUsize::new(0);
        Self { memory: Arc::clone(memory), pd: Arc::clone(pd), access, chunks, next }
    }

    /// Whether it is this memory, on this device, for this.
    pub(crate) fn is_of(
        &self,
        context: Context,
        memory: &Arc<GuestMemory>,
        access: Access,
    ) -> bool {
        self.pd.context() == context && Arc::ptr_eq(&self.memory, memory) && self.access == access
    }

    /// What its memory regions belong to, and so must the queue pairs that use them.
    pub(crate) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.pd
    }

    /// Registers all that is left, by a few threads.
    pub(crate) fn all_now(&self) -> Result<Registration, TransportError> {
        let began = Instant::now();
        let work = || -> Result<u64, TransportError> {
            let mut cost = Registration::default();
            while self.go_ahead(&mut cost)? {}
            Ok(cost.registered_bytes)
        };
        let left = self.chunks.len() - self.next.load(Ordering::Relaxed).min(self.chunks.len());
        let results: Vec<_> = thread::scope(|scope| {
            let others: Vec<_> = (1..THREADS.min(left)).map(|_| scope.spawn(work)).collect();
            let mine = work();
            let panicked = |_| Err(self.refused(io::Error::other("a thread panicked")));
            let theirs = others.into_iter().map(|other| other.join().unwrap_or_else(panicked));
            std::iter::once(mine).chain(theirs).collect()
        });
        let registered_bytes = results.into_iter().sum::<Result<u64, TransportError>>()?;
        Ok(Registration { registered_bytes, took: began.elapsed() })
    }

    /// Registers the next chunk in order that nobody has begun with; false if there is none.
    pub(crate) fn go_ahead(&self, cost: &mut Registration) -> Result<bool, TransportError> {
        match self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            Some(chunk) => self.ready(chunk, cost).map(|_| true),
            None => Ok(false),
        }
    }

    /// Registers the chunk after the one with this page, if nobody has or does.
    pub(crate) fn go_beyond(
        &self,
        region: u16,
        page: u64,
        cost: &mut Registration,
    ) -> Result<(), TransportError> {
        let index = find(&self.chunks, by_page, region, page).map_or(0, |index| index + 1);
        match self.chunks.get(index) {
            Some(chunk) if chunk.mr.get().is_none() && chunk.work.try_lock().is_ok() => {
                self.ready(chunk, cost).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// The chunk's memory region; registers it if that was not done.
    fn ready<'a>(
        &self,
        chunk: &'a Chunk,
        cost: &mut Registration,
    ) -> Result<&'a MemoryRegion, TransportError> {
        if let Some(mr) = chunk.mr.get() {
            return Ok(mr);
        }
        // Nothing is half done in there: a thread that panicked has registered it, or not.
        let _working = chunk.work.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mr) = chunk.mr.get() {
            return Ok(mr);
        }
        let began = Instant::now();
        let len_bytes = chunk.pages * PAGE_BYTES;
        let (pd, memory) = (&self.pd, &self.memory);
        let mr = MemoryRegion::of_guest(pd, memory, chunk.address, len_bytes, self.access)
            .map_err(|cause| self.refused(cause))?;
        cost.add(&Registration { registered_bytes: len_bytes, took: began.elapsed() });
        Ok(chunk.mr.get_or_init(|| mr))
    }

    /// The pages from this one on, as far as they lie in one chunk; registers it if need be.
    pub(crate) fn piece(
        &self,
        region: u16,
        page: u64,
        cost: &mut Registration,
    ) -> Result<Piece, TransportError> {
        let chunk = find(&self.chunks, by_page, region, page).and_then(|at| self.chunks.get(at));
        match chunk {
            Some(chunk) if chunk.region == region && page - chunk.first_page < chunk.pages => {
                let mr = self.ready(chunk, cost)?;
                let offset = page - chunk.first_page;
                Ok(Piece {
                    address: mr.address() + offset * PAGE_BYTES,
                    key: mr.local_key(),
                    pages: chunk.pages - offset,
                })
            }
            _ => Err(TransportError::OutOfOrder("guest memory that was never registered")),
        }
    }

    pub(crate) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// What the other side needs to know of the registered chunks from this one on, up to the
    /// first that is not registered.
    pub(crate) fn entries_from(&self, first: usize) -> impl Iterator<Item = Entry> + '_ {
        self.chunks.iter().skip(first).map_while(|chunk| {
            chunk.mr.get().map(|mr| Entry {
                region: chunk.region,
                first_page: chunk.first_page,
                pages: chunk.pages,
                address: mr.address(),
                key: mr.remote_key(),
            })
        })
    }

    fn refused(&self, cause: io::Error) -> TransportError {
        refused(cause, self.memory.layout().len_bytes())
    }
}

fn by_page(chunk: &Chunk) -> (u16, u64) {
    (chunk.region, chunk.first_page)
}

fn refused(cause: io::Error, bytes: u64) -> TransportError {
    let mib = bytes >> 20;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let advice = match (cause.raw_os_error(), limit) {
        (Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM), Some(limit)) => format!(
            "{mib} MiB have to be locked, and RLIMIT_MEMLOCK is {} KiB; raise it (ulimit -l, \
             LimitMEMLOCK of systemd), or give the process CAP_IPC_LOCK",
            limit >> 10
        ),
        _ => format!("the RDMA device does not take {mib} MiB"),
    };
    TransportError::Register { advice, cause }
}

/// Adds what moves pages between their places on both sides, in pieces that lie in one chunk here and
/// there; returns their bytes. Either side says where pages are from one on.
pub(crate) fn transfers(
    range: PageRange,
    mut here: impl FnMut(u16, u64) -> Result<Piece, TransportError>,
    there: impl Fn(u16, u64) -> Result<Piece, TransportError>,
    most_bytes: u64,
    into: &mut Vec<Transfer>,
) -> Result<u64, TransportError> {
    let mut page = range.first_page;
    let end = range.first_page + u64::from(range.pages);
    while page < end {
        let (local, remote) = (here(range.region, page)?, there(range.region, page)?);
        let pages = local.pages.min(remote.pages).min(end - page).min(most_bytes / PAGE_BYTES);
        // At most a write's, which is far less.
        let len_bytes = u32::try_from(pages * PAGE_BYTES).unwrap_or(u32::MAX);
        let span = Span { address: local.address, len_bytes, key: local.key };
        into.push(Transfer { span, address: remote.address, key: remote.key });
        page += pages;
    }
    Ok(range.len_bytes())
}

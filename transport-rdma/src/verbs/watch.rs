//! What happens to a device.
#![expect(unsafe_code, reason = "libibverbs is a C library")]

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;

use rdma_sys as sys;

use super::{Context, check, some};
use crate::port::DeviceEvent;

/// A device opened once more, to be told when its port or all of it fails.
pub(crate) struct Watch(NonNull<sys::ibv_context>);

// SAFETY: as for `Context`.
unsafe impl Send for Watch {}
// SAFETY: as for `Context`.
unsafe impl Sync for Watch {}

impl Watch {
    pub(crate) fn new(context: Context) -> io::Result<Self> {
        // SAFETY: rdma_cm never closes a context, nor its device.
        let device = unsafe { context.0.as_ref() }.device;
        // SAFETY: the device of an open context is there.
        let watch = Self(some(unsafe { sys::ibv_open_device(device) })?);
        rustix::io::ioctl_fionbio(watch.fd(), true)?;
        Ok(watch)
    }

    /// Readable when there is something to know.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as `self`.
        let fd: RawFd = unsafe { self.0.as_ref() }.async_fd;
        // SAFETY: open as long as the context.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// What happened to the device, if something did.
    pub(crate) fn take(&self) -> Option<DeviceEvent> {
        use sys::ibv_event_type as event;
        loop {
            // SAFETY: a union of pointers and numbers, and a number.
            let mut found: sys::ibv_async_event = unsafe { std::mem::zeroed() };
            // SAFETY: the context is open and its events do not block; the event is a place to write
            // to.
            let code = unsafe { sys::ibv_get_async_event(self.0.as_ptr(), &raw mut found) };
            if code != 0 {
                return None;
            }
            // A newer kernel may say what the bindings have no name for.
            // SAFETY: a number that the call has written.
            let kind = unsafe { (&raw const found.event_type).cast::<u32>().read() };
            // SAFETY: all of the union was zero or was written; whether it is a port the kind says.
            let port = u8::try_from(unsafe { found.element.port_num }).unwrap_or(0);
            // SAFETY: as it was got, of a kind without queues to be told; acknowledged once.
            unsafe { sys::ibv_ack_async_event(&raw mut found) };
            return Some(match kind {
                kind if kind == event::IBV_EVENT_PORT_ERR as u32 => DeviceEvent::PortDown { port },
                kind if kind == event::IBV_EVENT_PORT_ACTIVE as u32 => DeviceEvent::PortUp { port },
                kind if kind == event::IBV_EVENT_DEVICE_FATAL as u32 => DeviceEvent::Fatal,
                _ => continue,
            });
        }
    }

    /// Whether a port works.
    pub(crate) fn is_up(&self, port: u8) -> bool {
        Context(self.0).is_up(port)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: opened by `new`; nothing was made of it.
        let code = unsafe { sys::ibv_close_device(self.0.as_ptr()) };
        if let Err(error) = check(code) {
            tracing::error!("failed to close a device: {error}");
        }
    }
}

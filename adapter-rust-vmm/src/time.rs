//! The time of a guest: its virtual CPUs' time stamp counters and KVM's clock, read at one moment on one host and
//! set from it on another.
//!
//! A VMM that writes `IA32_TSC` to one virtual CPU after the other sets each to a moment that is over, by another
//! time each: the counters run apart, KVM no longer derives its clock from them (*master clock*), and a guest may
//! see time go back when it changes CPUs. Here all counters are set by their *offset* to the host's, which is the
//! same for all that were in step.
//!
//! Between the two moments the guest's time goes on, or stands still: [`Meanwhile`].
//!
//! Sources: the kernel's Documentation/virt/kvm/devices/vcpu.rst, section 4 (`KVM_VCPU_TSC_OFFSET`, since Linux
//! 5.16), and Documentation/virt/kvm/api.rst (`KVM_GET_CLOCK`, `KVM_SET_CLOCK`).
#![expect(unsafe_code, reason = "kvm-ioctls has no attributes of virtual CPUs on x86")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clock_data,
    kvm_device_attr,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use rustix::ioctl::{Opcode, Setter, opcode};
use thiserror::Error;

/// Group of all KVM calls (linux/kvm.h).
const KVMIO: u8 = 0xae;
const KVM_SET_DEVICE_ATTR: Opcode = opcode::write::<kvm_device_attr>(KVMIO, 0xe1);
const KVM_GET_DEVICE_ATTR: Opcode = opcode::write::<kvm_device_attr>(KVMIO, 0xe2);

/// What the guest's time does between the moment that is read and the one at which it is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meanwhile {
    /// It goes on, by the hosts' `CLOCK_REALTIME`, which must be in step (NTP): for a migration, of which the guest
    /// then notices a pause, and no clock of its that is late.
    GoesOn,
    /// It stands still: for a guest that is restored from a file, and shall not notice for how long it was there.
    StandsStill,
}

/// Why a guest's time could not be read or set.
#[derive(Debug, Error)]
#[error("failed to {operation}")]
pub struct TimeError {
    operation: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> TimeError {
    move |source| TimeError { operation, source: source.into() }
}

/// The time of a guest at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestTime {
    /// KVM's clock, in nanoseconds.
    pub clock_ns: u64,
    /// The host's `CLOCK_REALTIME` then, in nanoseconds since 1970. None where KVM does not say (before Linux
    /// 5.16, or where its clock is not derived from time stamp counters).
    pub realtime_ns: Option<u64>,
    /// The time stamp counter of each virtual CPU. None where KVM does not say.
    pub tsc: Option<Vec<u64>>,
}

impl GuestTime {
    /// Reads it of a guest that stands still, with all its virtual CPUs in order, whose counters run at the host's
    /// own frequency.
    pub fn read<'v>(
        vm: &VmFd,
        vcpus: impl IntoIterator<Item = &'v VcpuFd>,
    ) -> Result<Self, TimeError> {
        let clock = vm.get_clock().map_err(failed("read KVM's clock"))?;
        let offsets = vcpus.into_iter().map(|vcpu| tsc_offset(vcpu).ok());
        let offsets: Option<Vec<_>> =
            (clock.flags & KVM_CLOCK_HOST_TSC != 0).then(|| offsets.collect()).flatten();
        let tsc = |offset: u64| clock.host_tsc.wrapping_add(offset);
        Ok(Self {
            clock_ns: clock.clock,
            realtime_ns: (clock.flags & KVM_CLOCK_REALTIME != 0).then_some(clock.realtime),
            tsc: offsets.map(|offsets| offsets.into_iter().map(tsc).collect()),
        })
    }

    /// Sets it, before the first of the virtual CPUs runs, whose counters run at `tsc_khz`, which is the host's own
    /// frequency. Returns whether the counters are set too: where it says no, all that is left is to write
    /// `IA32_TSC`.
    pub fn set<'v>(
        &self,
        vm: &VmFd,
        vcpus: impl IntoIterator<Item = &'v VcpuFd>,
        tsc_khz: u32,
        meanwhile: Meanwhile,
    ) -> Result<bool, TimeError> {
        let by_realtime =
            vm.check_extension_int(Cap::AdjustClock) & KVM_CLOCK_REALTIME.cast_signed();
        let (flags, realtime) = match (meanwhile, self.realtime_ns) {
            (Meanwhile::GoesOn, Some(realtime)) if by_realtime != 0 => {
                (KVM_CLOCK_REALTIME, realtime)
            }
            _ => (0, 0),
        };
        let clock = kvm_clock_data { clock: self.clock_ns, flags, realtime, ..Default::default() };
        vm.set_clock(&clock).map_err(failed("set KVM's clock"))?;
        let now = vm.get_clock().map_err(failed("read KVM's clock"))?;
        let Some(tsc) = self.tsc.as_ref().filter(|_| now.flags & KVM_CLOCK_HOST_TSC != 0) else {
            return Ok(false);
        };
        let ticks = ticks(now.clock.saturating_sub(self.clock_ns), tsc_khz);
        for (vcpu, tsc) in vcpus.into_iter().zip(tsc) {
            let offset = tsc.wrapping_add(ticks).wrapping_sub(now.host_tsc);
            match set_tsc_offset(vcpu, offset).and_then(|()| tsc_offset(vcpu)) {
                Ok(now) if now == offset => {}
                // It takes any and keeps its own.
                Ok(_) => return Ok(false),
                Err(error) if is_unknown(&error) => return Ok(false),
                Err(error) => return Err(failed("set the offset of a time stamp counter")(error)),
            }
        }
        Ok(true)
    }
}

/// Gives all virtual CPUs the first one's time stamp counter, as KVM does by itself when they are made, unless
/// somebody has written to one. For a guest that has not run. Without a word where KVM has no offsets.
pub fn synchronize<'v>(vcpus: impl IntoIterator<Item = &'v VcpuFd>) -> Result<(), TimeError> {
    let vcpus: Vec<_> = vcpus.into_iter().collect();
    let Some(offset) = vcpus.first().and_then(|first| tsc_offset(first).ok()) else {
        return Ok(());
    };
    // The first too: by the second KVM would begin to count anew which are in step.
    vcpus.into_iter().try_for_each(|vcpu| {
        set_tsc_offset(vcpu, offset).map_err(failed("set the offset of a time stamp counter"))
    })
}

/// The answer of a KVM that has no offsets, and of one that has no attributes of virtual CPUs.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENXIO | libc::EINVAL | libc::ENOTTY))
}

/// Ticks of a counter in so many nanoseconds.
fn ticks(ns: u64, khz: u32) -> u64 {
    let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

fn attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value.expose_provenance() as u64,
        flags: 0,
    }
}

/// What is added to the host's time stamp counter for this virtual CPU. An error where KVM does not say (before
/// Linux 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0;
    // SAFETY: the opcode takes a kvm_device_attr by pointer, and writes nothing to it itself.
    let call = unsafe { Setter::<KVM_GET_DEVICE_ATTR, _>::new(attribute(&raw mut offset)) };
    // SAFETY: KVM writes eight bytes to the address of this attribute, which is `offset`'s.
    unsafe { rustix::ioctl::ioctl(fd(vcpu), call) }?;
    Ok(offset)
}

fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> io::Result<()> {
    // SAFETY: as above.
    let call = unsafe { Setter::<KVM_SET_DEVICE_ATTR, _>::new(attribute(&raw mut offset)) };
    // SAFETY: KVM reads eight bytes from the address of this attribute, which is `offset`'s.
    Ok(unsafe { rustix::ioctl::ioctl(fd(vcpu), call) }?)
}

fn fd(vcpu: &VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `vcpu`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_any_time_are_a_number() {
        assert_eq!(ticks(1_000_000, 2_400_000), 2_400_000);
        assert_eq!(ticks(u64::MAX, u32::MAX), u64::MAX);
        assert_eq!(ticks(0, 0), 0);
    }
}

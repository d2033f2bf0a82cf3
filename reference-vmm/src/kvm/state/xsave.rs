//! Areas of vector registers and model specific registers, as KVM reads and writes them.
#![expect(unsafe_code, reason = "KVM writes and reads XSAVE areas of a length it tells us")]

use kvm_bindings::{Msrs, Xsave, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::failed;
use crate::error::GuestError;
use crate::kvm::fpu::MIN_XSAVE_WORDS;

fn new_xsave(words: usize) -> Result<Xsave, GuestError> {
    Xsave::new(words.saturating_sub(MIN_XSAVE_WORDS))
        .map_err(|_| failed("allocate an XSAVE area")(kvm_ioctls::Error::new(libc::ENOMEM)))
}

/// Reads the vector registers; `words` is KVM's word on how long the area is.
pub(crate) fn read_xsave(vcpu: &VcpuFd, words: usize) -> Result<Vec<u32>, GuestError> {
    let failed = failed("read the vector registers");
    if words == MIN_XSAVE_WORDS {
        return Ok(vcpu.get_xsave().map_err(failed)?.region.to_vec());
    }
    let mut area = new_xsave(words)?;
    // SAFETY: the area is as long as KVM said its XSAVE areas are.
    unsafe { vcpu.get_xsave2(&mut area) }.map_err(failed)?;
    let head = area.as_fam_struct_ref().xsave.region;
    Ok(head.iter().chain(area.as_slice()).copied().collect())
}

/// Writes the vector registers from at most `words`; what is missing is zero.
pub(crate) fn write_xsave(vcpu: &VcpuFd, words: usize, xsave: &[u32]) -> Result<(), GuestError> {
    let mut area = new_xsave(words)?;
    let (head, tail) = xsave.split_at(xsave.len().min(MIN_XSAVE_WORDS));
    for (to, from) in area.as_mut_slice().iter_mut().zip(tail) {
        *to = *from;
    }
    // SAFETY: only the fixed part's contents are changed, not the length of the part behind it.
    let fixed = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    for (to, from) in fixed.iter_mut().zip(head) {
        *to = *from;
    }
    // SAFETY: the area is as long as KVM said its XSAVE areas are.
    unsafe { vcpu.set_xsave2(&area) }.map_err(failed("restore the vector registers"))
}

/// Reads the registers named, leaving out those that can't be read.
pub(super) fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, GuestError> {
    let entry = |index: &u32| kvm_msr_entry { index: *index, ..kvm_msr_entry::default() };
    let mut wanted: Vec<_> = indices.iter().map(entry).collect();
    let mut read = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut msrs = msr_list(&wanted)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(failed("read model specific registers"))?;
        read.extend_from_slice(&msrs.as_slice()[..count.min(wanted.len())]);
        // KVM stops at the first one it can't read.
        if let Some(unreadable) = wanted.get(count) {
            tracing::debug!(index = unreadable.index, "model specific register is unreadable");
        }
        wanted.drain(..wanted.len().min(count + 1));
    }
    Ok(read)
}

pub(super) fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), GuestError> {
    let mut left = entries;
    while !left.is_empty() {
        let msrs = msr_list(left)?;
        let count = vcpu.set_msrs(&msrs).map_err(failed("restore model specific registers"))?;
        if let Some(refused) = left.get(count) {
            // Some can be read but not written. That is fine as long as they are as they should.
            let here = read_msrs(vcpu, &[refused.index])?;
            if here.first().map(|msr| msr.data) != Some(refused.data) {
                let (index, value) = (refused.index, refused.data);
                return Err(GuestError::Msr { operation: "restore", index, value });
            }
        }
        left = left.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, GuestError> {
    Msrs::from_entries(entries)
        .map_err(|_| failed("list model specific registers")(kvm_ioctls::Error::new(libc::E2BIG)))
}

//! KVM's interrupt state as device state.

use kvm_bindings::{
    kvm_irqchip, kvm_lapic_state, kvm_pit_channel_state, kvm_vcpu_events,
    kvm_vcpu_events__bindgen_ty_1 as kvm_exception, kvm_vcpu_events__bindgen_ty_2 as kvm_interrupt,
    kvm_vcpu_events__bindgen_ty_3 as kvm_nmi, kvm_vcpu_events__bindgen_ty_4 as kvm_smi,
    kvm_vcpu_events__bindgen_ty_5 as kvm_triple_fault,
};
use pageferry_device_state::codec::Adapter;
use pageferry_device_state::{DeviceState, HookError};
use zerocopy::transmute;

use super::registers::{Kvm, mirror};

mirror! {
    /// An exception on its way.
    Exception for kvm_exception {
        #[device_state(tag = 1)] injected: u8,
        #[device_state(tag = 2)] nr: u8,
        #[device_state(tag = 3)] has_error_code: u8,
        #[device_state(tag = 4)] pending: u8,
        #[device_state(tag = 5)] error_code: u32,
    }
}

mirror! {
    /// An interrupt on its way.
    Interrupt for kvm_interrupt {
        #[device_state(tag = 1)] injected: u8,
        #[device_state(tag = 2)] nr: u8,
        #[device_state(tag = 3)] soft: u8,
        #[device_state(tag = 4)] shadow: u8,
    }
}

mirror! {
    /// A non-maskable interrupt on its way.
    Nmi for kvm_nmi {
        #[device_state(tag = 1)] injected: u8,
        #[device_state(tag = 2)] pending: u8,
        #[device_state(tag = 3)] masked: u8,
    }
}

mirror! {
    /// A system management interrupt on its way.
    Smi for kvm_smi {
        #[device_state(tag = 1)] smm: u8,
        #[device_state(tag = 2)] pending: u8,
        #[device_state(tag = 3)] smm_inside_nmi: u8,
        #[device_state(tag = 4)] latched_init: u8,
    }
}

mirror! {
    /// A triple fault on its way.
    TripleFault for kvm_triple_fault {
        #[device_state(tag = 1)] pending: u8,
    }
}

mirror! {
    /// What is on its way to a virtual CPU.
    Events for kvm_vcpu_events {
        #[device_state(tag = 1, with = Kvm)] exception: kvm_exception,
        #[device_state(tag = 2, with = Kvm)] interrupt: kvm_interrupt,
        #[device_state(tag = 3, with = Kvm)] nmi: kvm_nmi,
        #[device_state(tag = 4)] sipi_vector: u32,
        #[device_state(tag = 5)] flags: u32,
        #[device_state(tag = 6, with = Kvm)] smi: kvm_smi,
        #[device_state(tag = 7, with = Kvm)] triple_fault: kvm_triple_fault,
        #[device_state(tag = 8)] exception_has_payload: u8,
        #[device_state(tag = 9)] exception_payload: u64,
    }
}

mirror! {
    /// A channel of the timer (PIT).
    PitChannel for kvm_pit_channel_state {
        #[device_state(tag = 1)] count: u32,
        #[device_state(tag = 2)] latched_count: u16,
        #[device_state(tag = 3)] count_latched: u8,
        #[device_state(tag = 4)] status_latched: u8,
        #[device_state(tag = 5)] status: u8,
        #[device_state(tag = 6)] read_state: u8,
        #[device_state(tag = 7)] write_state: u8,
        #[device_state(tag = 8)] write_latch: u8,
        #[device_state(tag = 9)] rw_mode: u8,
        #[device_state(tag = 10)] mode: u8,
        #[device_state(tag = 11)] bcd: u8,
        #[device_state(tag = 12)] gate: u8,
        #[device_state(tag = 13)] count_load_time: i64,
    }
}

/// The local APIC's page of registers.
impl Adapter<kvm_lapic_state> for Kvm {
    type Stored = [u8; size_of::<kvm_lapic_state>()];

    fn blank() -> kvm_lapic_state {
        kvm_lapic_state::default()
    }

    fn store(kvm: &kvm_lapic_state) -> Result<Self::Stored, HookError> {
        Ok(transmute!(*kvm))
    }

    fn restore(stored: Self::Stored) -> Result<kvm_lapic_state, HookError> {
        Ok(transmute!(stored))
    }
}

/// An interrupt controller. What it is made of differs by its number, so it is stored as it is.
impl Adapter<kvm_irqchip> for Kvm {
    type Stored = [u8; size_of::<kvm_irqchip>()];

    fn blank() -> kvm_irqchip {
        kvm_irqchip::default()
    }

    fn store(kvm: &kvm_irqchip) -> Result<Self::Stored, HookError> {
        Ok(transmute!(*kvm))
    }

    fn restore(stored: Self::Stored) -> Result<kvm_irqchip, HookError> {
        Ok(transmute!(stored))
    }
}

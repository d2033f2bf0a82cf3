//! KVM's registers as device state: their fields with names, so that they can be printed and
//! compared, and padding and reserved fields left out.

use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_xcr, kvm_xcrs,
};
use pageferry_device_state::codec::Adapter;
use pageferry_device_state::{DeviceState, HookError};

/// Stores structures of KVM's.
pub(crate) struct Kvm;

/// Declares what is stored in place of a structure of KVM's: fields of the same names. What is not
/// named is zero when it comes back.
macro_rules! mirror {
    (
        $(#[$about:meta])*
        $name:ident for $kvm:ty {
            $(#[device_state($($attribute:tt)*)] $field:ident: $type:ty,)+
        }
    ) => {
        $(#[$about])*
        #[derive(DeviceState)]
        pub(crate) struct $name {
            $(#[device_state($($attribute)*)] $field: $type,)+
        }

        impl Adapter<$kvm> for Kvm {
            type Stored = $name;

            fn blank() -> $kvm {
                <$kvm>::default()
            }

            fn store(kvm: &$kvm) -> Result<$name, HookError> {
                Ok($name { $($field: kvm.$field,)+ })
            }

            fn restore(stored: $name) -> Result<$kvm, HookError> {
                let mut kvm = <$kvm>::default();
                $(kvm.$field = stored.$field;)+
                Ok(kvm)
            }
        }
    };
}

pub(super) use mirror;

mirror! {
    /// General registers.
    Registers for kvm_regs {
        #[device_state(tag = 1)] rax: u64,
        #[device_state(tag = 2)] rbx: u64,
        #[device_state(tag = 3)] rcx: u64,
        #[device_state(tag = 4)] rdx: u64,
        #[device_state(tag = 5)] rsi: u64,
        #[device_state(tag = 6)] rdi: u64,
        #[device_state(tag = 7)] rsp: u64,
        #[device_state(tag = 8)] rbp: u64,
        #[device_state(tag = 9)] r8: u64,
        #[device_state(tag = 10)] r9: u64,
        #[device_state(tag = 11)] r10: u64,
        #[device_state(tag = 12)] r11: u64,
        #[device_state(tag = 13)] r12: u64,
        #[device_state(tag = 14)] r13: u64,
        #[device_state(tag = 15)] r14: u64,
        #[device_state(tag = 16)] r15: u64,
        #[device_state(tag = 17)] rip: u64,
        #[device_state(tag = 18)] rflags: u64,
    }
}

mirror! {
    /// A segment register with its hidden part.
    Segment for kvm_segment {
        #[device_state(tag = 1)] base: u64,
        #[device_state(tag = 2)] limit: u32,
        #[device_state(tag = 3)] selector: u16,
        #[device_state(tag = 4, rename = "type")] type_: u8,
        #[device_state(tag = 5)] present: u8,
        #[device_state(tag = 6)] dpl: u8,
        #[device_state(tag = 7)] db: u8,
        #[device_state(tag = 8)] s: u8,
        #[device_state(tag = 9)] l: u8,
        #[device_state(tag = 10)] g: u8,
        #[device_state(tag = 11)] avl: u8,
        #[device_state(tag = 12)] unusable: u8,
    }
}

mirror! {
    /// Where a descriptor table is.
    Table for kvm_dtable {
        #[device_state(tag = 1)] base: u64,
        #[device_state(tag = 2)] limit: u16,
    }
}

mirror! {
    /// Segments, tables and control registers.
    SpecialRegisters for kvm_sregs {
        #[device_state(tag = 1, with = Kvm)] cs: kvm_segment,
        #[device_state(tag = 2, with = Kvm)] ds: kvm_segment,
        #[device_state(tag = 3, with = Kvm)] es: kvm_segment,
        #[device_state(tag = 4, with = Kvm)] fs: kvm_segment,
        #[device_state(tag = 5, with = Kvm)] gs: kvm_segment,
        #[device_state(tag = 6, with = Kvm)] ss: kvm_segment,
        #[device_state(tag = 7, with = Kvm)] tr: kvm_segment,
        #[device_state(tag = 8, with = Kvm)] ldt: kvm_segment,
        #[device_state(tag = 9, with = Kvm)] gdt: kvm_dtable,
        #[device_state(tag = 10, with = Kvm)] idt: kvm_dtable,
        #[device_state(tag = 11)] cr0: u64,
        #[device_state(tag = 12)] cr2: u64,
        #[device_state(tag = 13)] cr3: u64,
        #[device_state(tag = 14)] cr4: u64,
        #[device_state(tag = 15)] cr8: u64,
        #[device_state(tag = 16)] efer: u64,
        #[device_state(tag = 17)] apic_base: u64,
        #[device_state(tag = 18)] interrupt_bitmap: [u64; 4],
    }
}

mirror! {
    /// Debug registers.
    DebugRegisters for kvm_debugregs {
        #[device_state(tag = 1)] db: [u64; 4],
        #[device_state(tag = 2)] dr6: u64,
        #[device_state(tag = 3)] dr7: u64,
        #[device_state(tag = 4)] flags: u64,
    }
}

mirror! {
    /// An extended control register.
    ExtendedControl for kvm_xcr {
        #[device_state(tag = 1, rename = "number")] xcr: u32,
        #[device_state(tag = 2)] value: u64,
    }
}

mirror! {
    /// A model specific register.
    ModelSpecific for kvm_msr_entry {
        #[device_state(tag = 1)] index: u32,
        #[device_state(tag = 2, rename = "value")] data: u64,
    }
}

/// Extended control registers, as many as there are.
#[derive(DeviceState)]
pub(crate) struct ExtendedControls {
    #[device_state(tag = 1, with = Kvm, max_len = 16)]
    registers: Vec<kvm_xcr>,
}

impl Adapter<kvm_xcrs> for Kvm {
    type Stored = ExtendedControls;

    fn blank() -> kvm_xcrs {
        kvm_xcrs::default()
    }

    fn store(kvm: &kvm_xcrs) -> Result<ExtendedControls, HookError> {
        let count = usize::try_from(kvm.nr_xcrs)?;
        let registers = kvm.xcrs.get(..count).ok_or("KVM has more XCRs than it has room for")?;
        Ok(ExtendedControls { registers: registers.to_vec() })
    }

    fn restore(stored: ExtendedControls) -> Result<kvm_xcrs, HookError> {
        let nr_xcrs = u32::try_from(stored.registers.len())?;
        let mut kvm = kvm_xcrs { nr_xcrs, ..kvm_xcrs::default() };
        for (to, from) in kvm.xcrs.iter_mut().zip(stored.registers) {
            *to = from;
        }
        Ok(kvm)
    }
}

impl Adapter<kvm_mp_state> for Kvm {
    type Stored = u32;

    fn blank() -> kvm_mp_state {
        kvm_mp_state::default()
    }

    fn store(kvm: &kvm_mp_state) -> Result<u32, HookError> {
        Ok(kvm.mp_state)
    }

    fn restore(mp_state: u32) -> Result<kvm_mp_state, HookError> {
        Ok(kvm_mp_state { mp_state })
    }
}

//! Everything that can be declared.

use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use pageferry_device_state::DeviceState;

#[derive(DeviceState, Default)]
#[device_state(name = "all", version = 3, min_version = 2, priority = 4, after = "a", after = "b/c")]
#[device_state(retired(tag = 7, until = 2), pre_save = Self::before, post_load = "Self::after")]
pub struct All {
    #[device_state(tag = 1, since = 3, default = 4)]
    pub number: u8,
    #[device_state(tag = 2, max_len = LIMIT, rename = "what")]
    pub text: String,
    #[device_state(skip)]
    pub skipped: usize,
    #[device_state(tag = 3)]
    pub shared: Arc<AtomicU8>,
    #[device_state(subsection = "all/part", needed = "Self::is_needed")]
    pub part: Part,
}

const LIMIT: u32 = 10;

impl All {
    fn before(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn after(&mut self) -> Result<(), std::num::ParseIntError> {
        Ok(())
    }
    fn is_needed(&self) -> bool {
        true
    }
}

#[derive(DeviceState, Default)]
pub struct Part(#[device_state(tag = 1)] pub u8, #[device_state(skip)] pub usize);

#[derive(DeviceState)]
pub struct Nothing;

#[derive(DeviceState)]
pub enum Single {
    #[device_state(tag = 1)]
    Only { #[device_state(tag = 1)] r#type: u8 },
}

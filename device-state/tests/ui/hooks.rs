//! Hooks return a result.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
#[device_state(post_load = Self::check)]
//~ ERROR mismatched types
pub struct State {
    #[device_state(tag = 1)]
    pub field: u8,
}

impl State {
    fn check(&mut self) -> bool {
        self.field > 0
    }
}

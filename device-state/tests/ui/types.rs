//! Types that are no state.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
pub struct State {
    #[device_state(tag = 1)]
    pub words: usize,
    //~ ERROR `usize` cannot be stored as device state
    #[device_state(tag = 2)]
    pub float: f64,
    //~ ERROR `f64` cannot be stored as device state
}

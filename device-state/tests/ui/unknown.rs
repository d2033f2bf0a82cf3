//! Misspelt attributes are noticed.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
#[device_state(verzion = 2)]
//~ ERROR Unknown field: `verzion`
pub struct State {
    #[device_state(tag = 70000)]
    //~ ERROR number too large
    pub field: u8,
}

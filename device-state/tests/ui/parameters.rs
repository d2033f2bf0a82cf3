//! Types are whole.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
pub struct State<T> {
    //~ ERROR types with parameters cannot be device state
    //~v ERROR a field needs a tag, or `skip`; `tag = 1` is free
    pub field: T,
}

#[derive(DeviceState)]
pub enum Never {}
//~ ERROR an enum without variants has no state

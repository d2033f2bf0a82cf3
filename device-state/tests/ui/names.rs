//! Names can be told apart and printed.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
#[device_state(name = "Serial Port")]
//~ ERROR names are 1 to 64 lowercase letters, digits, `-`, `_`, `.` and `/`
pub struct Section {
    #[device_state(tag = 1)]
    pub one: u8,
    #[device_state(tag = 2, rename = "one")]
    //~ ERROR another field is called `one`
    pub two: u8,
}

#[derive(DeviceState)]
#[device_state(priority = 1)]
//~ ERROR only a section has an order: give the type a `name`
pub struct Part;

#[derive(DeviceState)]
#[device_state(name = "choice")]
//~ ERROR an enum cannot be a section: put it in a struct
pub enum Choice {
    #[device_state(tag = 1)]
    One,
}

//! Versions fit together.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
#[device_state(version = 2)]
pub struct Newer {
    #[device_state(tag = 1, since = 3, default)]
    //~ ERROR `since = 3` is later than the type's version, 2
    pub early: u8,
    #[device_state(tag = 2, since = 2)]
    pub without_default: u8,
    //~ ERROR a field that came with version 2 needs a `default`, since version 1 is still read
    #[device_state(tag = 3, since = 0)]
    //~ ERROR versions begin with 1
    pub zero: u8,
}

#[derive(DeviceState)]
#[device_state(version = 2, min_version = 3)]
//~ ERROR `min_version` is later than the version, 2
pub struct Backwards;

#[derive(DeviceState)]
#[device_state(version = 0, min_version = 0)]
//~ ERROR versions begin with 1
pub struct Zero;

#[derive(DeviceState)]
#[device_state(version = 2, retired(tag = 1, until = 2))]
//~ ERROR a tag is retired with a new version: `until` is before it, 2
pub struct StillThere;

#[derive(DeviceState)]
#[device_state(version = 2, min_version = 2)]
pub struct NoDefaultNeeded {
    #[device_state(tag = 2, since = 2)]
    pub field: u8,
}

//! Tags are there, once, and never again.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
#[device_state(version = 2, retired(tag = 9, until = 1))]
pub struct State {
    #[device_state(tag = 3)]
    pub first: u8,
    #[device_state(tag = 3)]
    //~ ERROR tag 3 is taken by field `first`
    pub second: u8,
    #[device_state(tag = 9)]
    //~ ERROR tag 9 is retired: streams up to version 1 hold something else under it
    pub third: u8,
    #[device_state(tag = 0)]
    //~ ERROR tags are 1 to 65535
    pub fourth: u8,
    pub fifth: u8,
    //~ ERROR a field needs a tag, or `skip`; `tag = 10` is free
}

#[derive(DeviceState)]
pub enum Choice {
    #[device_state(tag = 1)]
    First,
    #[device_state(tag = 1)]
    //~ ERROR tag 1 is taken by variant `First`
    Second,
    Third,
    //~ ERROR a variant needs a tag; `tag = 2` is free
}

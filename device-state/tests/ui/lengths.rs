//! What has no fixed length has a bound.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
pub struct State {
    #[device_state(tag = 1)]
    pub bytes: Vec<u8>,
    //~ ERROR a field without a fixed length needs `max_len`
    #[device_state(tag = 2)]
    pub text: Option<String>,
    //~ ERROR a field without a fixed length needs `max_len`
    #[device_state(tag = 3)]
    pub slice: Box<[u8]>,
    //~ ERROR a field without a fixed length needs `max_len`
    #[device_state(tag = 4)]
    pub array: [u8; 4],
    #[device_state(tag = 5, max_len = 4)]
    pub bounded: Vec<Vec<u8>>,
}

//! What the transports of a program can do here, for reports.

use pageferry::Chain;
use pageferry_iouring::{Features, IoUringOptions, Rings, Unavailable};
use pageferry_report::facts::TransportFacts;

/// Those that are built in.
pub fn transports() -> Vec<TransportFacts> {
    let tcp = "sendmsg from guest memory, MSG_ZEROCOPY where it pays".to_owned();
    vec![
        fact("tcp", Can::Do(tcp)),
        fact("iouring", iouring(Rings::new(IoUringOptions::default()).map(|it| it.features()))),
        #[cfg(feature = "rdma")]
        fact("rdma", rdma(pageferry_rdma::available())),
    ]
}

/// What a transport can do here, or why it can do nothing.
enum Can {
    Do(String),
    /// The machine has no such thing, or forbids it.
    Lack(String),
    Fail(String),
}

fn fact(name: &str, can: Can) -> TransportFacts {
    let (available, failed) = (matches!(can, Can::Do(_)), matches!(can, Can::Fail(_)));
    let (Can::Do(can) | Can::Lack(can) | Can::Fail(can)) = can;
    TransportFacts { name: name.to_owned(), can, available, failed }
}

fn iouring(features: Result<Features, Unavailable>) -> Can {
    match features {
        Ok(features) if features == Features::none() => {
            Can::Do("sends from guest memory".to_owned())
        }
        Ok(features) => Can::Do(format!("sends from guest memory, with {features}")),
        Err(failed @ Unavailable::Failed { .. }) => Can::Fail(Chain::of(&failed).to_string()),
        Err(lacking) => Can::Lack(lacking.to_string()),
    }
}

#[cfg(feature = "rdma")]
fn rdma(available: Result<(), pageferry_rdma::Unavailable>) -> Can {
    use pageferry_rdma::Unavailable;
    match available {
        Ok(()) => Can::Do("one-sided writes from guest memory to guest memory".to_owned()),
        Err(Unavailable::NoDevice) => Can::Lack("no RDMA device".to_owned()),
        Err(failed @ Unavailable::List(_)) => Can::Fail(Chain::of(&failed).to_string()),
        Err(lacking) => Can::Lack(lacking.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transports_speak_plain_words() {
        for TransportFacts { name, can, .. } in transports() {
            // Neither a set of Rust nor its names: `{SubmitAll, CoopTaskrun}`.
            let joined = |word: &str| word.chars().skip(1).any(char::is_uppercase);
            let shouted = |word: &str| !word.chars().any(char::is_lowercase);
            let rust = can.split_whitespace().find(|word| joined(word) && !shouted(word));
            assert!(!can.contains('{') && rust.is_none(), "{name}: {can}");
        }
    }

    #[test]
    fn what_a_machine_lacks_has_not_failed() {
        let told = |can| {
            let TransportFacts { available, failed, .. } = fact("any", can);
            (available, failed)
        };
        let old = Unavailable::TooOld { missing: "IORING_OP_SEND" };
        assert_eq!(told(iouring(Err(old))), (false, false));
        let cause = std::io::Error::from_raw_os_error(libc::ENOMEM);
        let broken = Unavailable::Failed { operation: "set up a ring", cause };
        assert_eq!(told(iouring(Err(broken))), (false, true));
        assert_eq!(told(iouring(Ok(Features::none()))), (true, false));
    }

    #[cfg(feature = "rdma")]
    #[test]
    fn a_machine_without_an_rdma_device_has_not_failed() {
        let absent = fact("rdma", rdma(Err(pageferry_rdma::Unavailable::NoDevice)));
        assert_eq!((absent.available, absent.failed), (false, false));
        assert_eq!(absent.can, "no RDMA device");
        let cause = std::io::Error::from_raw_os_error(libc::EACCES);
        assert!(fact("rdma", rdma(Err(pageferry_rdma::Unavailable::List(cause)))).failed);
    }
}

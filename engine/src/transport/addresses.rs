//! Internet addresses as people write them, for transports that are reached by one.

use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, ToSocketAddrs};

/// The addresses of a name, of which there is at least one.
///
/// An IPv6 address is written in brackets before its port, and the scope of a link-local one may be
/// a name there, `[fe80::1%eth0]:7400`, where the standard library takes numbers only. Without
/// brackets it is understood where a scope tells address and port apart, `fe80::1%eth0:7400`;
/// `fe80::1:7400` could be either, and is refused with the way to write it.
pub fn resolve(addr: &(impl ToSocketAddrs + fmt::Debug)) -> io::Result<Vec<SocketAddr>> {
    let text = text(addr);
    // Only what somebody wrote: others are addresses already, or lists of them.
    let scoped = if format!("{addr:?}").starts_with('"') { scoped(&text)? } else { None };
    let found: Vec<_> = match scoped {
        Some((host, port)) => {
            let found = (host, port).to_socket_addrs();
            found.map_err(|cause| no_scope(host, &cause))?.collect()
        }
        None => addr.to_socket_addrs()?.collect(),
    };
    if found.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    }
    Ok(found)
}

/// An IPv4 address that came in as an IPv6 one, as those of peers do at a socket for both, as what it is.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
            SocketAddr::new(v6.ip().to_canonical(), v6.port())
        }
        addr => addr,
    }
}

/// An address as its owner wrote it, for an error; without the quotes of a string.
pub fn text(addr: &impl fmt::Debug) -> String {
    format!("{addr:?}").trim_matches('"').to_owned()
}

/// Address and port, where the address has a scope.
fn scoped(text: &str) -> io::Result<Option<(&str, u16)>> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        rest.split_once("]:").ok_or_else(|| in_brackets(text.trim_matches(['[', ']']), "PORT"))?
    } else {
        match text.rsplit_once(':') {
            Some((host, port)) if host.contains(':') => (host, port),
            // IPv4, or a name.
            _ => return Ok(None),
        }
    };
    let scope_is_left_of_port = host.contains('%');
    match port.parse() {
        Ok(port) if scope_is_left_of_port => Ok(Some((host, port))),
        Ok(_) if text.starts_with('[') => Ok(None),
        Ok(_) if host.parse::<Ipv6Addr>().is_ok() => Err(in_brackets(host, port)),
        _ if text.starts_with('[') || scope_is_left_of_port => Err(in_brackets(host, "PORT")),
        _ => Err(in_brackets(text, "PORT")),
    }
}

fn in_brackets(host: &str, port: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("an IPv6 address is written in brackets before its port: [{host}]:{port}"),
    )
}

fn no_scope(host: &str, cause: &io::Error) -> io::Error {
    let scope = host.split_once('%').map_or(host, |(_, scope)| scope);
    io::Error::new(cause.kind(), format!("{cause}; is there a network interface {scope}?"))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn one(text: &str) -> SocketAddr {
        let found = resolve(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        found[0]
    }

    fn refused(text: &str) -> String {
        resolve(&text).expect_err(text).to_string()
    }

    #[test]
    fn scopes_have_names_and_numbers() {
        let by_number = one("[fe80::1%1]:7400");
        assert_eq!(by_number.to_string(), "[fe80::1%1]:7400");
        // The loopback interface is the first of every network namespace.
        assert_eq!(one("[fe80::1%lo]:7400"), by_number);
        assert_eq!(one("fe80::1%lo:7400"), by_number);
        assert_eq!(one("fe80::1%1:7400"), by_number);
    }

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        for text in ["[fe80::1%no-such0]:7400", "fe80::1%no-such0:7400"] {
            let error = refused(text);
            assert!(error.ends_with("; is there a network interface no-such0?"), "{error}");
        }
    }

    #[test]
    fn what_could_be_two_things_is_refused_with_the_way_to_write_it() {
        for (text, right) in [
            ("fe80::1:7400", "[fe80::1]:7400"),
            ("::1:7400", "[::1]:7400"),
            ("fe80::1", "[fe80::1]:PORT"),
            ("fe80::1%lo", "[fe80::1%lo]:PORT"),
            ("fe80::1%lo:port", "[fe80::1%lo]:PORT"),
            ("[fe80::1%lo]", "[fe80::1%lo]:PORT"),
            ("[::1]", "[::1]:PORT"),
            ("[::1]:", "[::1]:PORT"),
            ("[::1]:70000", "[::1]:PORT"),
        ] {
            let error = refused(text);
            let end = format!("in brackets before its port: {right}");
            assert!(error.ends_with(&end), "{text}: {error}");
        }
    }

    #[test]
    fn ipv4_is_shown_as_ipv4_and_ipv6_as_it_is() {
        for (text, shown) in [
            ("[::ffff:127.0.0.8]:7400", "127.0.0.8:7400"),
            ("127.0.0.8:7400", "127.0.0.8:7400"),
            ("[::1]:7400", "[::1]:7400"),
            ("[fe80::1%1]:7400", "[fe80::1%1]:7400"),
        ] {
            assert_eq!(canonical(one(text)).to_string(), shown);
        }
    }

    #[test]
    fn all_else_is_as_it_was() {
        assert_eq!(one("[::1]:7400").to_string(), "[::1]:7400");
        assert_eq!(one("127.0.0.1:7400").to_string(), "127.0.0.1:7400");
        let two = [one("[::1]:1"), one("127.0.0.1:2")];
        assert_eq!(resolve(&&two[..]).expect("addresses"), two);
        assert_eq!(resolve(&("::1", 7)).expect("an address"), [one("[::1]:7")]);
        assert_eq!(resolve(&two[0]).expect("an address"), [two[0]]);
        assert!(resolve(&&two[..0]).is_err(), "nowhere");
        assert!(resolve(&"127.0.0.1").is_err(), "no port");
        assert_eq!(text(&"a:1"), "a:1");
    }
}

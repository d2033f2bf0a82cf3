//! Command lines that make no sense, and the help.

use crate::support::run;

#[test]
fn nonsense_is_refused_with_help() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["throughput", "--memory", "0"], &["--memory", "512M"]),
        (&["throughput", "--memory", "1Q"], &["--memory", "'1Q'", "512M"]),
        (&["throughput", "--memory", "100000001"], &["--memory", "4096"]),
        (&["throughput", "--memory", "1E"], &["--memory", "at most"]),
        (&["throughput", "--memory=67M", "--backing=hugetlb"], &["--memory", "2097152"]),
        (&["throughput", "--memory=4K", "--channels=2"], &["--memory", "--channels"]),
        (&["throughput", "--channels", "0"], &["--channels", "1..=256"]),
        (&["throughput", "--pairs", "0"], &["--pairs"]),
        (&["throughput", "--zero-share", "1.5"], &["--zero-share", "between 0.0 and 1.0"]),
        (&["throughput", "--zero-share", "nan"], &["--zero-share", "between 0.0 and 1.0"]),
        (&["throughput", "--dirty-rate", "fast"], &["--dirty-rate"]),
        (&["throughput", "--transport", "pigeon"], &["--transport", "tcp"]),
        (&["throughput", "--rdma-slice=5000"], &["--rdma-slice", "4096"]),
        (&["throughput", "--zero-copy", "maybe"], &["--zero-copy", "auto", "off", "on"]),
        (&["throughput", "--backing", "paper"], &["--backing", "memfd"]),
        (&["bitmap", "--guest", "1G,0"], &["--guest", "512M"]),
        (&["bitmap", "--guest", "1E"], &["--guest", "at most"]),
        (&["bitmap", "--guest", "5000"], &["--guest", "4096"]),
        (&["bitmap", "--threads", "1,0"], &["--threads", "1..=256"]),
        (&["bitmap", "--dirty", "2"], &["--dirty", "between 0.0 and 1.0"]),
        (&["latency", "--memory", "5000"], &["--memory", "4096"]),
        (&["latency", "--pings", "0"], &["--pings"]),
        (&["latency", "--rate", "0"], &["--rate"]),
        (&["migrate", "--memory", "8M"], &["--working-set", "--memory"]),
        (&["migrate", "--workload", "sequential,dance"], &["--workload", "dance"]),
        (&["migrate", "--host-load", "lots"], &["--host-load"]),
        (&["compare", "--channels", "200"], &["--channels", "1..=128"]),
        (&["compare", "--memory", "5000"], &["--memory", "4096"]),
        (&["compare-guests", "--memory", "64M"], &["--working-set", "--memory"]),
        (&["compare-guests", "--downtime-limit", "1us"], &["--downtime-limit", "1 ms"]),
        (&["report"], &["FILE"]),
        (&["hot", "dance"], &["coalesce"]),
        (&["gate"], &["--head"]),
        (&["simulate", "--scenarios", "0"], &["--scenarios"]),
        (&["dance"], &["dance"]),
        (&[], &["throughput", "bitmap"]),
    ];
    for (args, parts) in cases {
        let ran = run(args);
        assert_eq!(ran.status, Some(2), "{args:?}");
        assert_eq!(ran.stdout, "", "{args:?}");
        for part in *parts {
            assert!(ran.stderr.contains(part), "{args:?}: no {part:?} in {}", ran.stderr);
        }
    }
}

#[cfg(not(feature = "rdma"))]
#[test]
fn a_program_without_rdma_says_so() {
    for command in ["throughput", "latency"] {
        let ran = run(&[command, "--transport=rdma"]);
        assert_eq!((ran.status, ran.stdout.as_str()), (Some(2), ""));
        assert!(
            ran.stderr.contains("--transport rdma: this program was built without"),
            "{}",
            ran.stderr
        );
    }
}

#[test]
fn help_has_examples_and_exit_codes() {
    for (args, part) in [
        (&["--help"][..], "pageferry-bench throughput"),
        (&["throughput", "--help"], "/proc/sys/vm/nr_hugepages"),
        (&["bitmap", "--help"], "pageferry-bench bitmap --guest"),
        (&["latency", "--help"], "re-arm of a batch's first page"),
        (&["migrate", "--help"], "pageferry-bench migrate --dirty-rate"),
        (&["compare", "--help"], "iperf3"),
        (&["compare-guests", "--help"], "multifd"),
    ] {
        let ran = run(args);
        assert_eq!(ran.status, Some(0), "{args:?}");
        for part in ["Examples:", "Exit status:", "3  cancelled", part] {
            assert!(ran.stdout.contains(part), "{args:?}: no {part:?} in\n{}", ran.stdout);
        }
        assert!(!ran.stdout.contains("side "), "{args:?} shows what is not for users");
    }
}

//! The JSON report, as a script sees it.

use serde_json::Value;

/// One JSON object of `--json`.
#[derive(Debug)]
pub(crate) struct Report(Value);

/// Numbers that every report of a source has.
const NUMBERS: &[&str] = &[
    "total_ms",
    "downtime_ms",
    "throughput_gbps",
    "heartbeat_gap_ms",
    "downtime_limit_ms",
    "setup_ms",
    "registration_ms",
    "registered_on_the_way_ms",
    "verify_ms",
    "dirty_pages_per_second",
    "cpu_ms",
    "device_state_save_ms",
    "device_state_load_ms",
    "called_off_ms",
];
const COUNTS: &[&str] = &[
    "channels",
    "memory_bytes",
    "working_set_bytes",
    "rounds",
    "bytes_on_wire",
    "user_copied_bytes",
    "system_calls",
    "rejoins",
    "lost_channels",
    "reopened_channels",
    "damaged_pages",
    "rebalances",
    "device_state_bytes",
    "heartbeats",
    "vcpus",
    "switchover_attempts",
    "throttle_max_percent",
];
const TEXTS: &[&str] = &[
    "outcome",
    "guest_at",
    "guest",
    "transport",
    "workload",
    "backing",
    "dirty_source",
    "convergence",
];
const DOWNTIME_PARTS: &[&str] =
    &["pause", "final_harvest", "final_pages", "device_state", "commit", "resume"];

impl Report {
    /// From one line of stdout, which must hold it and nothing else.
    pub(crate) fn parse(line: &str) -> Self {
        match serde_json::from_str(line) {
            Ok(object @ Value::Object(_)) => Self(object),
            other => panic!("stdout has something else than a JSON object: {other:?}: {line:?}"),
        }
    }

    fn at(&self, path: &str) -> &Value {
        let field = path.split('.').try_fold(&self.0, |object, name| object.get(name));
        field.unwrap_or_else(|| panic!("no {path} in {self:?}"))
    }

    pub(crate) fn text(&self, path: &str) -> &str {
        self.at(path).as_str().unwrap_or_else(|| panic!("{path} is no text in {self:?}"))
    }

    pub(crate) fn number(&self, path: &str) -> f64 {
        self.at(path).as_f64().unwrap_or_else(|| panic!("{path} is no number in {self:?}"))
    }

    pub(crate) fn count(&self, path: &str) -> u64 {
        self.at(path).as_u64().unwrap_or_else(|| panic!("{path} is no count in {self:?}"))
    }

    /// True, false or null.
    pub(crate) fn flag(&self, path: &str) -> Option<bool> {
        let flag = self.at(path);
        assert!(flag.is_boolean() || flag.is_null(), "{path} is no boolean in {self:?}");
        flag.as_bool()
    }

    pub(crate) fn is_null(&self, path: &str) -> bool {
        self.at(path).is_null()
    }

    /// What scripts rely on: fields, their types, and sums.
    pub(crate) fn assert_contract(&self) {
        assert_eq!(self.count("schema"), 1);
        for path in NUMBERS {
            let number = self.number(path);
            assert!(number.is_finite() && number >= 0.0, "{path} is {number} in {self:?}");
        }
        for path in COUNTS {
            self.count(path);
        }
        for path in TEXTS {
            self.text(path);
        }
        for kind in ["data", "zero", "encoded"] {
            self.count(&format!("pages.{kind}"));
        }
        for figure in ["sent", "copied_by_kernel", "sent_bytes", "copied_bytes"] {
            self.count(&format!("zero_copy.{figure}"));
        }
        let parts = DOWNTIME_PARTS.iter().map(|part| self.number(&format!("downtime.{part}")));
        let (sum, whole): (f64, _) = (parts.sum(), self.number("downtime_ms"));
        assert!((sum - whole).abs() <= 0.01, "parts of {sum} ms, {whole} in all: {self:?}");
        self.flag("oracle_ok");
        self.flag("memory_match");
        assert_eq!(self.count("user_copied_bytes"), 0);
    }

    /// A source's account of a guest that left.
    pub(crate) fn assert_departed(&self) {
        self.assert_left();
        assert_eq!(self.count("user_copied_bytes"), 0);
    }

    /// The same of one whose pages were encrypted: by the kernel where it can, and else with a copy in the process.
    pub(crate) fn assert_departed_encrypted(&self) {
        self.assert_left();
        self.assert_encrypted();
    }

    fn assert_encrypted(&self) {
        let by_kernel = pageferry_tcp::kernel_tls_unavailable().is_none();
        assert_eq!(self.count("user_copied_bytes") == 0, by_kernel, "{self:?}");
    }

    fn assert_left(&self) {
        assert_eq!((self.text("outcome"), self.text("guest_at")), ("completed", "destination"));
        assert!(self.is_null("error"), "{self:?}");
        assert!(self.count("rounds") >= 1 && self.count("bytes_on_wire") > 0, "{self:?}");
        assert!(self.number("total_ms") >= self.number("downtime_ms"), "{self:?}");
        assert!(self.number("downtime_ms") > 0.0, "{self:?}");
        assert!(self.count("device_state_bytes") > 100, "{self:?}");
        let took = ["device_state_save_ms", "device_state_load_ms"].map(|name| self.number(name));
        assert!(took.iter().all(|took| *took > 0.0), "{self:?}");
        assert!(self.number("predicted_downtime_ms") > 0.0, "{self:?}");
        assert!(self.count("switchover_attempts") >= 1, "{self:?}");
        let throttled = self.count("throttle_max_percent") > 0;
        let convergence = if throttled { "throttled" } else { "converged" };
        assert_eq!(self.text("convergence"), convergence);
    }

    /// A destination's account of a guest that runs there, and lost nothing.
    pub(crate) fn assert_arrived(&self) {
        self.assert_runs();
        assert_eq!(self.count("user_copied_bytes"), 0);
    }

    /// The same of one whose pages were encrypted.
    pub(crate) fn assert_arrived_encrypted(&self) {
        self.assert_runs();
        self.assert_encrypted();
    }

    fn assert_runs(&self) {
        assert_eq!((self.text("outcome"), self.text("guest_at")), ("completed", "destination"));
        assert!(self.is_null("error"), "{self:?}");
        assert_eq!(self.flag("oracle_ok"), Some(true), "{self:?}");
    }

    /// A source's account of a guest that stayed: it has beaten more often than `beats`, and lost
    /// nothing. The error says all of `why`.
    pub(crate) fn assert_kept(&self, outcome: &str, why: &[&str], beats: u64) {
        assert_eq!((self.text("outcome"), self.text("guest_at")), (outcome, "source"), "{self:?}");
        self.assert_error(why);
        assert_eq!(self.flag("oracle_ok"), Some(true), "{self:?}");
        assert!(self.count("heartbeats") > beats, "no beat after the first {beats}: {self:?}");
        self.assert_contract();
    }

    /// A destination's account of a guest that did not come. The error says all of `why`.
    pub(crate) fn assert_did_not_come(&self, outcome: &str, why: &[&str]) {
        assert_eq!((self.text("outcome"), self.text("guest_at")), (outcome, "source"), "{self:?}");
        self.assert_error(why);
        assert!(self.is_null("heartbeats") && self.is_null("oracle_ok"), "{self:?}");
    }

    fn assert_error(&self, why: &[&str]) {
        let error = self.text("error");
        for part in why {
            assert!(error.contains(part), "no {part:?} in the error {error:?}");
        }
    }
}

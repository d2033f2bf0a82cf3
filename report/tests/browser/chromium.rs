//! A headless Chromium, driven by its debugging protocol over a pipe: no port, no network.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where it is, if it is.
pub(crate) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .flat_map(|directory| {
            ["chromium", "chromium-browser", "google-chrome"].map(|name| directory.join(name))
        })
        .find(|path| path.is_file())
}

/// The browser with one page.
pub(crate) struct Chromium {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    session: Option<String>,
    next_id: u64,
    /// What happened and nobody has asked for yet.
    events: VecDeque<Value>,
    _profile: TempDir,
}

impl Chromium {
    pub(crate) fn start(program: &Path) -> Self {
        let profile = tempfile::tempdir().expect("a directory for its profile");
        let words = profile.path().join("words");
        // It talks on the descriptors 3 and 4, which a shell can give it.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null"])
            .arg(program)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"])
            .args(["--no-first-run", "--disable-background-networking"])
            .args(["--disable-component-update", "--disable-sync", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.path().join("profile").display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&words).expect("a file for what it says"))
            .spawn()
            .expect("start the browser");
        let to = child.stdin.take().expect("a pipe");
        let from = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut browser = Self {
            child,
            to,
            from,
            session: None,
            next_id: 0,
            events: VecDeque::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}));
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", &attach);
        browser.session = Some(session["sessionId"].as_str().expect("a session").to_owned());
        browser
    }

    /// Has it do something, and returns what came of it.
    pub(crate) fn call(&mut self, method: &str, params: &Value) -> Value {
        self.next_id += 1;
        let mut order = json!({"id": self.next_id, "method": method, "params": params});
        if let Some(session) = &self.session {
            order["sessionId"] = json!(session);
        }
        let order = format!("{order}\0");
        self.to.write_all(order.as_bytes()).expect("the browser listens");
        loop {
            let mut answer = self.read();
            if answer["id"] == self.next_id {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].take();
            }
            self.events.push_back(answer);
        }
    }

    fn read(&mut self) -> Value {
        let mut text = Vec::new();
        self.from.read_until(0, &mut text).expect("the browser talks");
        text.pop();
        serde_json::from_slice(&text).expect("the browser lives, and talks JSON")
    }

    /// Shows a file, at a width, in light or dark.
    pub(crate) fn show(&mut self, file: &Path, width: u32, dark: bool) {
        let metrics =
            json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600});
        self.call("Emulation.setDeviceMetricsOverride", &metrics);
        self.call("Emulation.setScrollbarsHidden", &json!({"hidden": true}));
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", &media);
        self.call("Page.enable", &json!({}));
        let url = format!("file://{}", file.display());
        self.events.clear();
        self.call("Page.navigate", &json!({"url": url}));
        while self.next_event()["method"] != "Page.loadEventFired" {}
    }

    fn next_event(&mut self) -> Value {
        self.events.pop_front().unwrap_or_else(|| self.read())
    }

    /// What a script comes to.
    pub(crate) fn evaluate(&mut self, script: &str) -> Value {
        let params = json!({"expression": script, "returnByValue": true});
        let mut result = self.call("Runtime.evaluate", &params);
        assert!(result["exceptionDetails"].is_null(), "{result}");
        result["result"]["value"].take()
    }

    /// The whole page as a PNG, or what of it is as high.
    pub(crate) fn screenshot(&mut self, width: u32, height: u32) -> Vec<u8> {
        let clip = json!({"x": 0, "y": 0, "width": width, "height": height, "scale": 1});
        let params = json!({"format": "png", "captureBeyondViewport": true, "clip": clip});
        let result = self.call("Page.captureScreenshot", &params);
        STANDARD.decode(result["data"].as_str().expect("a picture")).expect("base64")
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // Both calls do nothing to a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

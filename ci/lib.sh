# What the steps of ci/test share.

out=target/ci
mkdir -p "$out"
passed=0
skips=()
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)

fail() {
    echo "ci: $*" >&2
    exit 1
}

# skip WHAT WHY
skip() {
    echo "ci: $1 skipped, because $2"
    skips+=("$1: $2")
}

count_passed() {
    passed=$((passed + ${1:-0}))
}

# Every line "…skipped, because …" of a log, once.
collect_skips() {
    while IFS= read -r line; do
        echo "ci: $line"
        skips+=("$line")
    done < <(grep -ohiE '[^ ].*skipped, because .*' "$1" | sort -u)
}

msrv() {
    sed -nE 's/^rust-version = "(.*)"/\1/p' Cargo.toml
}

# need_command COMMAND PACKAGE
need_command() {
    command -v "$1" >/dev/null || need_package "$2"
}

need_package() {
    command -v apt-get >/dev/null || fail "there is no $1, and no apt-get to install it with"
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y "$1"
}

run_steps() {
    local step began
    # Words, as they come from the command line or the default.
    # shellcheck disable=SC2068
    for step in $@; do
        declare -F "step_$step" >/dev/null || fail "there is no step $step"
        began=$SECONDS
        echo "ci: $step"
        "step_$step"
        echo "ci: $step done in $((SECONDS - began)) s"
    done
    echo "total: $passed passed, 0 failed, ${#skips[@]} skipped"
}

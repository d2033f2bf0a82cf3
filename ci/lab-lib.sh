# What the checks of programs in ci/lab share: sourced by ci/lab-migrations, ci/lab-rdma and
# ci/lab-convergence, in the clone. $out is where the programs leave what they print: NAME.out,
# NAME.err, NAME.status.

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}
mkdir -p "$CARGO_TARGET_DIR"
CARGO_TARGET_DIR=$(cd "$CARGO_TARGET_DIR" && pwd -P)
. ci/lib.sh

# need_lab WHAT: ends the script, with a word, where there can be no lab.
need_lab() {
    local reason
    reason=$(ci/lab doctor 2>&1) && return
    echo "$1 skipped, because ${reason//$'\n'/ }"
    exit 0
}

# in_lab OPTIONS... -- COMMAND...: as `ci/lab run`.
in_lab() {
    ci/lab run --out "$out" "$@"
}

# build_tests OPTIONS...: what cargo's options choose, as part of the workspace, as it was built already to
# run on this machine.
build_tests() {
    cargo test --locked --workspace "$@" --no-run --message-format json-render-diagnostics \
        >"$out/tests.json" 2>>"$out/build.log"
}

# test_binary FOLDER NAME: of those that were built, that of a crate.
test_binary() {
    sed -nE "/\/$1#/ { /\"name\":\"$2\"/ s/.*\"executable\":\"([^\"]+)\".*/\1/p }" "$out/tests.json"
}

# field NAME FIELD: of a report, or of what is in its "zero_copy".
field() {
    case $2 in
    zero_copy.*) sed -nE "s/.*\"zero_copy\":\{([^}]*)\}.*/\1/p" "$out/$1.out" ;;
    *) cat "$out/$1.out" ;;
    esac 2>/dev/null | grep -oE "\"${2#zero_copy.}\":(\"[^\"]*\"|[^,}]*)" | head -n 1 |
        sed -E 's/^"[^"]*"://; s/"//g'
}

# show NAME: how it ended. What panicked may be far above the end.
show() {
    grep -h -A 3 'panicked at' "$out/$1".{err,out} 2>/dev/null | head -n 40 | cut -c 1-2000
    tail -n 20 "$out/$1".{status,messages,err,out} 2>/dev/null | cut -c 1-2000
    return 1
}

# ended NAME: with status 0.
ended() {
    [ "$(cat "$out/$1.status" 2>/dev/null)" = 0 ] || show "$1"
}

# passed NAME: tests, of which there were some.
passed() {
    ended "$1" && grep -qE '^test result: ok. [1-9][0-9]* passed' "$out/$1.out" &&
        ! grep -q 'skipped, because' "$out/$1.err" "$out/$1.out"
}

is() {
    [ "$(field "$1" "$2")" = "$3" ] && return
    echo "        $2 is $(field "$1" "$2"), not $3; $(field "$1" error)"
    return 1
}

# kept NAME WORDS: the migration failed in these words, and the guest runs at the source.
kept() {
    { [ "$(field "$1" guest_at)" = source ] && [ "$(field "$1" oracle_ok)" = true ] &&
        grep -qE "\"error\":\"[^\"]*($2)" "$out/$1.out"; } || show "$1"
}

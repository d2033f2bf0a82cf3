# What the checks of programs in ci/lab share: sourced by ci/lab-migrations and ci/lab-rdma, in the
# clone. $out is where the programs leave what they print: NAME.out, NAME.err, NAME.status.

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}
mkdir -p "$CARGO_TARGET_DIR"
CARGO_TARGET_DIR=$(cd "$CARGO_TARGET_DIR" && pwd -P)
failures=0

# need_lab WHAT: ends the script, with a word, where there can be no lab.
need_lab() {
    local reason
    reason=$(ci/lab doctor 2>&1) && return
    echo "$1 skipped, because ${reason//$'\n'/ }"
    exit 0
}

# in_lab OPTIONS... -- COMMAND...: as `ci/lab run`. A machine that dies by itself (its CPUs are
# emulated, and get stuck) is started once more, and that is said.
in_lab() {
    local status=0
    ci/lab run --out "$out" "$@" || status=$?
    [ "$status" = 125 ] || return "$status"
    echo "        (the virtual machine failed by itself, and is started once more)"
    ci/lab run --out "$out" "$@"
}

# test_binary SOURCE: of what cargo built according to $out/build.log. cargo names it relative to the
# clone or absolute.
test_binary() {
    realpath "$(sed -nE "s|^ *Executable .*$1 \((.*)\)$|\1|p" "$out/build.log")"
}

# check WHAT COMMAND...: the command says whether it is so.
check() {
    local what=$1
    shift
    if "$@"; then
        echo "ok      $what"
    else
        echo "FAILED  $what"
        failures=$((failures + 1))
        return 1
    fi
}

# field NAME FIELD: of a report, or of what is in its "zero_copy".
field() {
    case $2 in
    zero_copy.*) sed -nE "s/.*\"zero_copy\":\{([^}]*)\}.*/\1/p" "$out/$1.out" ;;
    *) cat "$out/$1.out" ;;
    esac 2>/dev/null | grep -oE "\"${2#zero_copy.}\":(\"[^\"]*\"|[^,}]*)" | head -n 1 |
        sed -E 's/^"[^"]*"://; s/"//g'
}

# show NAME: how it ended.
show() {
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
    echo "        $2 is $(field "$1" "$2"), not $3"
    return 1
}

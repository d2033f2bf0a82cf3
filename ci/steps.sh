# How ci/test runs its steps, and what it says of them: sourced by it, after ci/lib.sh.

# run_steps STEP...: one after the other. A/B+C+D is A and then B, beside C and then D, for what leaves a CPU idle.
# However it ends, $out/summary.json and a table say what ran, for how long, and what was skipped and why.
run_steps() {
    local step each began
    # Words, as they come from the command line or the default.
    # shellcheck disable=SC2068
    for step in $@; do
        for each in ${step//[+\/]/ }; do
            declare -F "step_$each" >/dev/null || fail "there is no step $each"
        done
    done
    trap summarize EXIT
    # shellcheck disable=SC2068
    for step in $@; do
        began=$SECONDS
        echo "ci: $step"
        case $step in
        *+*) at_once ${step//+/ } ;;
        */*) fail "$step: nothing is beside them" ;;
        *) one "$step" ;;
        esac
        echo "ci: $step done in $((SECONDS - began)) s"
    done
    running=()
}

# What summarize tells, a line a step: name, seconds, seconds of CPU time, passed, skipped.
ran=()
# The steps that have not come to an end.
running=()
all_began=$SECONDS

# Sets cpu to the seconds of CPU time of all that this shell has waited for.
count_cpu() {
    local file=$out/times.$BASHPID
    # In a subshell it would be that one's.
    times >"$file"
    cpu=$(awk -F '[ms ]+' 'NR == 2 { printf "%d", ($1 + $3) * 60 + $2 + $4 }' "$file")
    rm "$file"
}

one() {
    local began=$SECONDS passed_before=$passed skipped_before=${#skips[@]} cpu cpu_before
    count_cpu
    cpu_before=$cpu
    running=("$1")
    "step_$1"
    running=()
    count_cpu
    ran+=("$1 $((SECONDS - began)) $((cpu - cpu_before)) $((passed - passed_before)) $((${#skips[@]} - skipped_before))")
}

# at_once A/B STEP...: A and then B, and beside them the others one after the other, with what they leave of the CPUs.
at_once() {
    local step failed=() counted processes=() first
    IFS=/ read -ra first <<<"$1"
    shift
    running=("${first[@]}" "$@")
    for step in "${running[@]}"; do
        rm -f "$out/$step.counted"
    done
    # Each is a process group, so that a signal ends all of it.
    set -m
    trap 'kill -- "${processes[@]/#/-}" 2>/dev/null || true; exit 130' INT TERM
    count_steps "${first[@]}" </dev/null &
    processes+=($!)
    nice_steps "$@" </dev/null &
    processes+=($!)
    set +m
    wait
    trap - INT TERM
    for step in "${running[@]}"; do
        [ -e "$out/$step.counted" ] || { failed+=("$step") && continue; }
        mapfile -t counted <"$out/$step.counted"
        count_passed "${counted[0]##* }"
        skips+=("${counted[@]:1}")
        ran+=("$step ${counted[0]} $((${#counted[@]} - 1))")
    done
    running=("${failed[@]}")
    [ ${#failed[@]} = 0 ] || fail "failed: ${failed[*]}"
}

nice_steps() {
    renice -n 19 -p "$BASHPID" >/dev/null
    count_steps "$@"
}

# count_steps STEP...: one after the other, whether or not one fails. What each prints comes when it ends, and
# what it counts is in $out/STEP.counted; there is none of one that failed. In a shell of its own.
count_steps() {
    local step began
    trap - EXIT
    # What is started here stays in this process group. A shell in `if` or `||` would not end at an error.
    set +me
    for step; do
        began=$SECONDS
        (
            set -e
            passed=0 skips=()
            "step_$step"
            count_cpu
            echo "ci: $step took $((SECONDS - began)) s, and $cpu s of CPU time"
            printf '%s\n' "$((SECONDS - began)) $cpu $passed" "${skips[@]}" >"$out/$step.counted"
        ) >"$out/$step.output" 2>&1
        cat "$out/$step.output"
    done
}

# json_string TEXT
json_string() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "$(tr -d '\000-\037' <<<"$text")"
}

# Before the shell ends, whatever ended it.
summarize() {
    local status=$? line step seconds cpu count skipped separator=''
    local outcome=passed
    [ "$status" = 0 ] || outcome=failed
    {
        printf '{"outcome":"%s","seconds":%d,"passed":%d,"steps":[' \
            "$outcome" "$((SECONDS - all_began))" "$passed"
        for line in "${ran[@]}"; do
            read -r step seconds cpu count skipped <<<"$line"
            printf '%s{"step":"%s","outcome":"passed","seconds":%d,"cpu_seconds":%d,"passed":%d,"skipped":%d}' \
                "$separator" "$step" "$seconds" "$cpu" "$count" "$skipped"
            separator=,
        done
        for step in "${running[@]}"; do
            printf '%s{"step":"%s","outcome":"failed"}' "$separator" "$step"
            separator=,
        done
        printf '],"skipped":['
        separator=''
        for line in "${skips[@]}"; do
            printf '%s%s' "$separator" "$(json_string "$line")"
            separator=,
        done
        printf ']}\n'
    } >"$out/summary.json"
    printf '%-18s %8s %8s %8s %8s\n' step seconds CPU passed skipped
    for line in "${ran[@]}"; do
        # Words.
        # shellcheck disable=SC2086
        printf '%-18s %8s %8s %8s %8s\n' $line
    done
    for step in "${running[@]}"; do
        printf '%-18s %8s\n' "$step" FAILED
    done
    for line in "${skips[@]}"; do
        echo "skipped: $line"
    done
    echo "total: $passed passed, ${#running[@]} failed, ${#skips[@]} skipped"
}

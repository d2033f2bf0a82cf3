/*
 * The only program of a tiny guest: it writes its memory all the time and checks what it reads, and so it does with
 * the blocks of a disk if there is one.
 *
 * Each page has a counter in its first word and a mix of counter and page number in its last; how often each page
 * was written is kept elsewhere too. A page that came from elsewhere, or from another time, shows. A line goes to
 * the serial console for each pass over all pages, and one for the first error; and, if that is asked for, one for
 * each millisecond.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, WORDS = PAGE_BYTES / 8 };

static uint64_t mix(uint64_t count, uint64_t page)
{
    uint64_t mixed = count ^ page * 0x9E3779B97F4A7C15u;
    mixed ^= mixed >> 29;
    return mixed * 0xBF58476D1CE4E5B9u;
}

/* The number after a word of the kernel's command line. */
static size_t parameter(const char *word, size_t otherwise)
{
    static char line[4096];
    int file = open("/proc/cmdline", O_RDONLY);
    ssize_t length = file < 0 ? -1 : read(file, line, sizeof line - 1);
    const char *found = length > 0 ? strstr(line, word) : NULL;

    close(file);
    return found ? strtoul(found + strlen(word), NULL, 10) : otherwise;
}

static uint64_t *some_pages(size_t pages)
{
    uint64_t *memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        printf("guest: no memory for %zu pages\n", pages);
        exit(1);
    }
    return memory;
}

/*
 * Writes pages all the time, but for a rest of so many microseconds after each MiB; and so many steps of work for
 * each page, which take the longer the less of a CPU there is.
 */
static void use_memory(const char *name, size_t pages, size_t rest, size_t work)
{
    enum { PAGES_BETWEEN_RESTS = (1 << 20) / PAGE_BYTES };
    uint64_t *memory = some_pages(pages);
    uint64_t *counts = some_pages(pages * sizeof *counts / PAGE_BYTES + 1);
    volatile uint64_t worked = 0;

    for (size_t page = 0; page < pages; page++)
        memory[page * WORDS + WORDS - 1] = mix(0, page);
    for (uint64_t pass = 1, errors = 0;; pass++) {
        for (size_t page = 0; page < pages; page++) {
            volatile uint64_t *words = memory + page * WORDS;
            if ((words[0] != counts[page] || words[WORDS - 1] != mix(counts[page], page)) && !errors++)
                printf("guest: %s: page %zu has %llu, not %llu\n", name, page,
                       (unsigned long long)words[0], (unsigned long long)counts[page]);
            counts[page]++;
            words[0] = counts[page];
            words[WORDS - 1] = mix(counts[page], page);
            for (size_t step = 0; step < work; step++)
                worked = mix(worked, step);
            if (rest && page % PAGES_BETWEEN_RESTS == 0)
                usleep(rest);
        }
        printf("guest: %s pass %llu errors %llu\n", name, (unsigned long long)pass,
               (unsigned long long)errors);
    }
}

/* Writes blocks of pages and reads them to other pages, past the guest's cache. */
static void use_disk(int disk)
{
    enum { BLOCKS = 64, BLOCK_PAGES = 16, BLOCK_WORDS = BLOCK_PAGES * WORDS };
    const size_t block_bytes = BLOCK_PAGES * PAGE_BYTES;
    uint64_t *written = some_pages(BLOCK_PAGES);
    uint64_t *read_to = some_pages(BLOCKS * BLOCK_PAGES);

    for (uint64_t pass = 1, errors = 0;; pass++) {
        for (size_t block = 0; block < BLOCKS; block++) {
            for (size_t page = 0; page < BLOCK_PAGES; page++)
                written[page * WORDS] = written[page * WORDS + WORDS - 1] = mix(pass, block);
            /* What is read lands where the last pass's is, or that of the pass before. */
            uint64_t *to = read_to + (block + pass) % BLOCKS * BLOCK_WORDS;
            off_t at = (off_t)(block * block_bytes);
            if (pwrite(disk, written, block_bytes, at) != (ssize_t)block_bytes ||
                pread(disk, to, block_bytes, at) != (ssize_t)block_bytes) {
                printf("guest: disk: block %zu: %s\n", block, strerror(errno));
                exit(1);
            }
        }
        for (size_t block = 0; block < BLOCKS; block++)
            for (size_t page = 0; page < BLOCK_PAGES; page++) {
                const volatile uint64_t *words =
                    read_to + (block + pass) % BLOCKS * BLOCK_WORDS + page * WORDS;
                uint64_t wanted = mix(pass, block);
                if ((words[0] != wanted || words[WORDS - 1] != wanted) && !errors++)
                    printf("guest: disk: page %zu of block %zu is another\n", page, block);
            }
        printf("guest: disk pass %llu errors %llu\n", (unsigned long long)pass,
               (unsigned long long)errors);
    }
}

/* Says that the guest lives, every millisecond. */
static void beat(void)
{
    const struct timespec millisecond = { 0, 1000000 };

    for (;;) {
        nanosleep(&millisecond, NULL);
        puts("beat");
    }
}

/* Loads the modules of /modules in the order of their names. */
static void load_modules(void)
{
    struct dirent **names;
    int count = scandir("/modules", &names, NULL, alphasort);

    for (int i = 0; i < count; i++) {
        char path[512];
        if (names[i]->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
        int module = open(path, O_RDONLY);
        /* What is built in is there already. */
        int is_compressed = strstr(path, ".ko.") ? 4 /* MODULE_INIT_COMPRESSED_FILE */ : 0;
        if (syscall(SYS_finit_module, module, "", is_compressed) && errno != EEXIST)
            printf("guest: %s: %s\n", path, strerror(errno));
        close(module);
    }
}

int main(void)
{
    mkdir("/dev", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, 0);
    dup2(open("/dev/ttyS0", O_RDWR), 1);
    setvbuf(stdout, NULL, _IOLBF, 0);

    size_t pages = parameter("pages=", 4096);
    size_t rest = parameter("rest=", 0);
    size_t work = parameter("work=", 0);
    if (parameter("disk=", 0)) {
        load_modules();
        int disk = open("/dev/vda", O_RDWR | O_DIRECT);
        if (disk < 0)
            printf("guest: /dev/vda: %s\n", strerror(errno));
        else if (!fork())
            use_disk(disk);
    }
    if (parameter("beats=", 0) && !fork())
        beat();
    if (sysconf(_SC_NPROCESSORS_ONLN) > 1 && !fork())
        use_memory("second", pages / 2, rest, work);
    use_memory("memory", pages, rest, work);
}

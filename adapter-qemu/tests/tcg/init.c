/*
 * The only program of a tiny guest: it writes its memory all the time and checks what it reads.
 *
 * Each page has a counter in its first word and a mix of counter and page number in its last; how often each page
 * was written is kept elsewhere too. A page that came from elsewhere, or from another time, shows. A line goes to
 * the serial console for each pass over all pages, and one for the first error.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
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

    return found ? strtoul(found + strlen(word), NULL, 10) : otherwise;
}

int main(void)
{
    mkdir("/dev", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, 0);
    int console = open("/dev/ttyS0", O_RDWR);
    dup2(console, 1);
    setvbuf(stdout, NULL, _IOLBF, 0);

    size_t pages = parameter("pages=", 4096);
    uint64_t *memory = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *counts = calloc(pages, sizeof *counts);
    if (memory == MAP_FAILED || !counts) {
        printf("guest: no memory for %zu pages\n", pages);
        return 1;
    }
    for (size_t page = 0; page < pages; page++)
        memory[page * WORDS + WORDS - 1] = mix(0, page);

    for (uint64_t pass = 1, errors = 0;; pass++) {
        for (size_t page = 0; page < pages; page++) {
            volatile uint64_t *words = memory + page * WORDS;
            if ((words[0] != counts[page] || words[WORDS - 1] != mix(counts[page], page)) && !errors++)
                printf("guest: page %zu has %llu, not %llu\n", page,
                       (unsigned long long)words[0], (unsigned long long)counts[page]);
            counts[page]++;
            words[0] = counts[page];
            words[WORDS - 1] = mix(counts[page], page);
        }
        printf("guest: pass %llu errors %llu\n", (unsigned long long)pass, (unsigned long long)errors);
    }
}

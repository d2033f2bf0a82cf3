/*
 * A guest that consists of this file, for where Linux takes minutes to boot: under a KVM that is itself emulated.
 *
 * It writes and checks its memory as init.c does, with one CPU and without a rest, and tells the serial port the same.
 * Multiboot (version 1) starts it: in 32-bit protected mode, with interrupts off and without paging.
 */
#include <stdint.h>

enum { PAGE_BYTES = 4096, WORDS = PAGE_BYTES / 8 };

/* Where it keeps how often it wrote each page, and the pages: far from what the firmware uses. */
#define COUNTS ((volatile uint32_t *)(8 << 20))
#define PAGES ((volatile uint64_t *)(16 << 20))

/* The header of Multiboot is a magic number, flags, and what makes their sum zero. */
__asm__(".text\n"
        ".balign 4\n"
        ".long 0x1BADB002, 0, -0x1BADB002\n"
        ".globl _start\n"
        "_start: mov $stack + 4096, %esp\n"
        "push %ebx\n"
        "call run\n");

static char stack[4096] __attribute__((used, aligned(16)));

/* The beginning of what Multiboot hands over. */
struct start {
    uint32_t flags, memory[2], boot_device;
    const char *command_line;
};

static uint64_t mix(uint64_t count, uint64_t page)
{
    uint64_t mixed = count ^ page * 0x9E3779B97F4A7C15u;
    mixed ^= mixed >> 29;
    return mixed * 0xBF58476D1CE4E5B9u;
}

/* To the first serial port (16550A): its line status tells when it takes the next. */
static void say(const char *text)
{
    enum { DATA = 0x3F8, LINE_STATUS = DATA + 5, TAKES_MORE = 0x20 };

    for (; *text; text++) {
        uint8_t status;
        do
            __asm__ volatile("inb %1, %0" : "=a"(status) : "d"((uint16_t)LINE_STATUS));
        while (!(status & TAKES_MORE));
        __asm__ volatile("outb %0, %1" : : "a"(*text), "d"((uint16_t)DATA));
    }
}

static void say_number(uint32_t number)
{
    char digits[11], *first = digits + 10;

    *first = 0;
    do
        *--first = '0' + number % 10;
    while (number /= 10);
    say(first);
}

/* The number after a word of the command line. */
static uint32_t parameter(const char *line, const char *word)
{
    for (; *line; line++) {
        const char *here = line, *there = word;
        uint32_t number = 0;
        while (*there && *here == *there)
            here++, there++;
        if (*there)
            continue;
        while (*here >= '0' && *here <= '9')
            number = number * 10 + (*here++ - '0');
        return number;
    }
    return 0;
}

__attribute__((used, noreturn)) static void run(const struct start *start)
{
    uint32_t pages = parameter(start->command_line, "pages="), errors = 0;
    uint32_t work = parameter(start->command_line, "work=");
    volatile uint64_t worked = 0;

    for (uint32_t page = 0; page < pages; page++) {
        COUNTS[page] = 0;
        PAGES[page * WORDS + WORDS - 1] = mix(0, page);
    }
    for (uint32_t pass = 1;; pass++) {
        for (uint32_t page = 0; page < pages; page++) {
            volatile uint64_t *words = PAGES + page * WORDS;
            uint32_t count = COUNTS[page];
            if ((words[0] != count || words[WORDS - 1] != mix(count, page)) && !errors++) {
                say("guest: memory: page ");
                say_number(page);
                say(" has ");
                say_number(words[0]);
                say(", not ");
                say_number(count);
                say("\n");
            }
            COUNTS[page] = ++count;
            words[0] = count;
            words[WORDS - 1] = mix(count, page);
            for (uint32_t step = 0; step < work; step++)
                worked = mix(worked, step);
        }
        say("guest: memory pass ");
        say_number(pass);
        say(" errors ");
        say_number(errors);
        say("\n");
    }
}

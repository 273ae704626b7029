"""Which code takes a lock that waits, and which atomic operations only look like it."""

from __future__ import annotations

import pytest

from tests.unit.analysis.snippets import BUILDS, LEVELS, Build, Case, locks_of, parameters, table

pytestmark = pytest.mark.together("build")

_LOCK = "lock"
_FREE = ""

_BITS = "a lock of one bit in a word: what is stored and expected depends on the other bits"
_CLAIM = (
    "the compiler makes the 0 that was read a constant, and that the loop is left when it is another is not looked at"
)
_BYTE = "the byte that is exchanged, or what is got, is not followed"

LOCKS = (
    Case(
        "exchange_loop",
        _LOCK,
        "static int @w; void @take(void) { while (__atomic_exchange_n(&@w, 1, __ATOMIC_ACQUIRE)) {} }",
    ),
    Case(
        "test_and_set",
        _LOCK,
        "static bool @w; void @take(void) { while (__atomic_test_and_set(&@w, __ATOMIC_ACQUIRE)) {} }",
        wrong=_BYTE,
        wrong_in=("x86_64-Os",),
    ),
    Case(
        "flag",
        _LOCK,
        "static atomic_flag @w; void @take(void) { while (atomic_flag_test_and_set(&@w)) {} }",
        wrong=_BYTE,
        wrong_in=("x86_64-Os",),
    ),
    Case(
        "exchange_with_load",
        _LOCK,
        """
        static int @w; void @take(void) {
            while (__atomic_exchange_n(&@w, 1, __ATOMIC_ACQUIRE)) while (__atomic_load_n(&@w, __ATOMIC_RELAXED)) {}
        }""",
    ),
    Case(
        "pausing",
        _LOCK,
        """
        static int @w; void @take(void) {
            while (__atomic_exchange_n(&@w, 1, __ATOMIC_ACQUIRE))
            #ifdef __x86_64__
                __builtin_ia32_pause();
            #else
                asm volatile("yield");
            #endif
        }""",
    ),
    Case(
        "cas_loop",
        _LOCK,
        """
        static int @w; void @take(void) {
            int zero = 0;
            while (!__atomic_compare_exchange_n(&@w, &zero, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) zero = 0;
        }""",
    ),
    Case("sync_cas", _LOCK, "static int @w; void @take(void) { while (!__sync_bool_compare_and_swap(&@w, 0, 1)) {} }"),
    Case(
        "sync_cas_value", _LOCK, "static int @w; void @take(void) { while (__sync_val_compare_and_swap(&@w, 0, 1)) {} }"
    ),
    Case("sync_test_and_set", _LOCK, "static int @w; void @take(void) { while (__sync_lock_test_and_set(&@w, 1)) {} }"),
    Case("word_of_parameter", _LOCK, "void @take(int *w) { while (__atomic_exchange_n(w, 1, __ATOMIC_ACQUIRE)) {} }"),
    Case(
        "owner_cas",
        _LOCK,
        "static void *@w; void @take(void *me) { while (!__sync_bool_compare_and_swap(&@w, (void *)0, me)) {} }",
    ),
    Case(
        "yielding",
        _LOCK,
        "static int @w; void @take(void) { while (__atomic_exchange_n(&@w, 1, __ATOMIC_ACQUIRE)) sched_yield(); }",
    ),
    Case(
        "napping",
        _LOCK,
        """
        static int @w; void @take(void) {
            struct timespec t = {0, 1000};
            while (__atomic_exchange_n(&@w, 1, __ATOMIC_ACQUIRE)) nanosleep(&t, 0);
        }""",
    ),
    Case(
        "slow_path_elsewhere",
        _LOCK,
        """
        static int @w;
        NOINLINE void @slow(int *w) {
            while (__atomic_exchange_n(w, 2, __ATOMIC_ACQUIRE)) syscall(SYS_futex, w, FUTEX_WAIT, 2, 0); }
        void @take(void) { int z = 0;
            if (!__atomic_compare_exchange_n(&@w, &z, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) @slow(&@w); }""",
    ),
    Case(
        "futex_by_syscall",
        _LOCK,
        """
        static int @w; void @take(void) {
            while (__atomic_exchange_n(&@w, 2, __ATOMIC_ACQUIRE)) syscall(SYS_futex, &@w, FUTEX_WAIT |
                FUTEX_PRIVATE_FLAG, 2, 0);
        }""",
    ),
    Case(
        "futex_by_instruction",
        _LOCK,
        """
        static int @w;
        static inline long @wait(int *w) {
        #ifdef __x86_64__
            long r; register long t asm("r10") = 0;
            asm volatile("syscall" : "=a"(r) : "a"(202L), "D"(w), "S"(128L), "d"(2L), "r"(t) : "rcx", "r11",
                "memory"); return r;
        #else
            register long n asm("x8") = 98, a asm("x0") = (long)w, b asm("x1") = 128, c asm("x2") = 2, d asm("x3") = 0;
            asm volatile("svc #0" : "+r"(a) : "r"(n), "r"(b), "r"(c), "r"(d) : "memory"); return a;
        #endif
        }
        void @take(void) { while (__atomic_exchange_n(&@w, 2, __ATOMIC_ACQUIRE)) @wait(&@w); }""",
    ),
    Case("mutex", _LOCK, "static pthread_mutex_t @m; void @take(void) { pthread_mutex_lock(&@m); }"),
    Case("mutex_in_object", _LOCK, "void @take(char *p) { pthread_mutex_lock((void *)(p + 40)); work(1); }"),
    Case("spinlock", _LOCK, "static pthread_spinlock_t @m; void @take(void) { pthread_spin_lock(&@m); work(1); }"),
    Case("rwlock", _LOCK, "static pthread_rwlock_t @m; void @take(void) { pthread_rwlock_wrlock(&@m); work(1); }"),
    Case("semaphore", _LOCK, "static sem_t @m; void @take(void) { sem_wait(&@m); work(1); }"),
    Case("c11", _LOCK, "static mtx_t @m; void @take(void) { mtx_lock(&@m); work(1); }"),
    Case(
        "through_method",
        _LOCK,
        """
        static int @w;
        NOINLINE void @slow(int *w) { while (__atomic_exchange_n(w, 1, __ATOMIC_ACQUIRE)) sched_yield(); }
        NOINLINE void @lock(int *w) { if (__atomic_exchange_n(w, 1, __ATOMIC_ACQUIRE)) @slow(w); }
        void @take(void) { @lock(&@w); work(1); }""",
    ),
    Case(
        "ticket",
        _LOCK,
        """
        static unsigned @next, @now; void @take(void) {
            unsigned mine = __atomic_fetch_add(&@next, 1, __ATOMIC_RELAXED);
            while (__atomic_load_n(&@now, __ATOMIC_ACQUIRE) != mine) {}
        }""",
    ),
    Case(
        "look_then_cas",
        _LOCK,
        """
        static int @w; void @take(void) {
            int zero;
            do { while (__atomic_load_n(&@w, __ATOMIC_RELAXED)) {} zero = 0; }
            while (!__atomic_compare_exchange_n(&@w, &zero, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
        }""",
    ),
    Case(
        "ticket_pausing",
        _LOCK,
        """
        static unsigned @next, @now; void @take(void) {
            unsigned mine = __atomic_fetch_add(&@next, 1, __ATOMIC_RELAXED);
            while (__atomic_load_n(&@now, __ATOMIC_ACQUIRE) != mine)
            #ifdef __x86_64__
                __builtin_ia32_pause();
            #else
                asm volatile("yield");
            #endif
        }""",
    ),
    Case(
        "bit_lock",
        _LOCK,
        "static unsigned long @w; void @take(void) { while (__atomic_fetch_or(&@w, 1, __ATOMIC_ACQUIRE) & 1) {} }",
    ),
    Case(
        "bit_cas",
        _LOCK,
        """
        static unsigned @w; void @take(void) {
            unsigned old;
            do { old = __atomic_load_n(&@w, __ATOMIC_RELAXED) & ~1u; }
            while (!__atomic_compare_exchange_n(&@w, &old, old | 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
        }""",
        wrong=_BITS,
        wrong_in=("-mno-outline-atomics", "aarch64-O0-march=armv8.1-a"),
    ),
    Case(
        "bit_looked_at",
        _LOCK,
        """
        static unsigned @w; void @take(void) {
            for (;;) {
                unsigned old = __atomic_load_n(&@w, __ATOMIC_RELAXED);
                if (!(old & 8) && __atomic_compare_exchange_n(&@w, &old, old | 8, 0, __ATOMIC_ACQUIRE,
                    __ATOMIC_RELAXED)) return;
            }
        }""",
    ),
    Case(
        "highest_bit",
        _LOCK,
        """
        static unsigned @w; void @take(void) {
            while (__atomic_fetch_or(&@w, 0x80000000u, __ATOMIC_ACQUIRE) & 0x80000000u) {}
        }""",
    ),
    Case(
        "ticket_yielding",
        _LOCK,
        """
        static unsigned @next, @now; void @take(void) {
            unsigned mine = __atomic_fetch_add(&@next, 1, __ATOMIC_RELAXED);
            while (__atomic_load_n(&@now, __ATOMIC_ACQUIRE) != mine) sched_yield();
        }""",
    ),
    Case(
        "ticket_of_halves",
        _LOCK,
        """
        static unsigned @w; void @take(void) {
            unsigned drawn = __atomic_fetch_add(&@w, 0x10000, __ATOMIC_ACQUIRE);
            unsigned short mine = drawn >> 16;
            while ((unsigned short)__atomic_load_n(&@w, __ATOMIC_ACQUIRE) != mine) {}
        }""",
    ),
    Case(
        "counted_spin_then_yield",
        _LOCK,
        """
        static int @w; void @take(void) {
            for (int n = 0; ; n++) {
                int zero = 0;
                if (__atomic_compare_exchange_n(&@w, &zero, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return;
                if (n > 100) { sched_yield(); n = 0; }
            }
        }""",
    ),
)

LOCK_FREE = (
    Case(
        "highest_bit_tried_once",
        _FREE,
        """
        static unsigned @w; int @mark(void) {
            return !(__atomic_fetch_or(&@w, 0x80000000u, __ATOMIC_ACQUIRE) & 0x80000000u);
        }""",
    ),
    Case(
        "bit_set_by_cas",
        _FREE,
        """
        static unsigned @w; void @mark(void) {
            unsigned old = __atomic_load_n(&@w, __ATOMIC_RELAXED);
            while (!__atomic_compare_exchange_n(&@w, &old, old | 8, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {}
        }""",
    ),
    Case(
        "bit_set_unless_set",
        _FREE,
        """
        static unsigned @w; bool @claim(void) {
            unsigned old = __atomic_load_n(&@w, __ATOMIC_RELAXED);
            do { if (old & 8) return false; }
            while (!__atomic_compare_exchange_n(&@w, &old, old | 8, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
            return true;
        }""",
    ),
    Case(
        "ticket_not_waited_for",
        _FREE,
        """
        static unsigned @next, @now; bool @draw(void) {
            unsigned mine = __atomic_fetch_add(&@next, 1, __ATOMIC_RELAXED);
            return __atomic_load_n(&@now, __ATOMIC_ACQUIRE) == mine;
        }""",
    ),
    Case(
        "bit_tried_once",
        _FREE,
        "static unsigned long @w; int @mark(void) { return !(__atomic_fetch_or(&@w, 1, __ATOMIC_ACQUIRE) & 1); }",
    ),
    Case(
        "bits_of_many_words",
        _FREE,
        """
        static unsigned long @w[64]; int @claim(void) {
            int n = 0;
            while (n < 63 && (__atomic_fetch_or(&@w[n], 1, __ATOMIC_ACQUIRE) & 1)) n++;
            return n;
        }""",
    ),
    Case(
        "claimed_if_free",
        _FREE,
        """
        static int @w; bool @claim(void) {
            int old = __atomic_load_n(&@w, __ATOMIC_RELAXED);
            while (old == 0)
                if (__atomic_compare_exchange_n(&@w, &old, 1, 1, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return true;
            return false;
        }""",
        wrong=_CLAIM,
        wrong_in=(
            "x86_64-O1",
            "aarch64-O1",
            "aarch64-O2",
            "aarch64-Os",
            *(
                f"aarch64-{level}-{how}"
                for level in ("O1", "O2", "Os")
                for how in ("mno-outline-atomics", "march=armv8.1-a")
            ),
        ),
    ),
    Case("count", _FREE, "static long @n; void @hit(void) { __atomic_fetch_add(&@n, 1, __ATOMIC_RELAXED); }"),
    Case(
        "count_and_read",
        _FREE,
        "static long @n; long @hit(void) { return __atomic_add_fetch(&@n, 1, __ATOMIC_SEQ_CST); }",
    ),
    Case(
        "maximum",
        _FREE,
        """
        static long @n; void @raise(long v) {
            long old = __atomic_load_n(&@n, __ATOMIC_RELAXED);
            while (old < v && !__atomic_compare_exchange_n(&@n, &old, v, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
        }""",
    ),
    Case(
        "push",
        _FREE,
        """
        struct @node { struct @node *next; }; static struct @node *@head;
        void @push(struct @node *n) {
            n->next = __atomic_load_n(&@head, __ATOMIC_RELAXED);
            while (!__atomic_compare_exchange_n(&@head, &n->next, n, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {}
        }""",
    ),
    Case(
        "push_sync",
        _FREE,
        """
        struct @node { struct @node *next; }; static struct @node *@head;
        void @push(struct @node *n) {
            struct @node *old;
            do { old = @head; n->next = old; } while (!__sync_bool_compare_and_swap(&@head, old, n));
        }""",
    ),
    Case(
        "pop",
        _FREE,
        """
        struct @node { struct @node *next; }; static struct @node *@head;
        struct @node *@pop(void) {
            struct @node *old = __atomic_load_n(&@head, __ATOMIC_ACQUIRE);
            while (old && !__atomic_compare_exchange_n(&@head, &old, old->next, 0, __ATOMIC_ACQ_REL,
                __ATOMIC_ACQUIRE)) {}
            return old;
        }""",
    ),
    Case(
        "pop_of_tagged",
        _FREE,
        """
        struct @tagged { struct @tagged *next; }; static unsigned long @top;
        struct @tagged *@pop_tagged(void) {
            unsigned long old = __atomic_load_n(&@top, __ATOMIC_ACQUIRE);
            struct @tagged *node;
            while ((node = (struct @tagged *)(old & 0xffffffffffff)) &&
                !__atomic_compare_exchange_n(&@top, &old, (unsigned long)node->next | ((old >> 48) + 1) << 48, 0,
                    __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {}
            return node;
        }""",
    ),
    Case(
        "take_all",
        _FREE,
        "static void *@head; void *@flush(void) { return __atomic_exchange_n(&@head, (void *)0, __ATOMIC_ACQ_REL); }",
    ),
    Case(
        "swap_once",
        _FREE,
        "static void *@p; void *@set(void *v) { return __atomic_exchange_n(&@p, v, __ATOMIC_ACQ_REL); }",
    ),
    Case("refer", _FREE, "void @get(int *n) { __atomic_fetch_add(n, 1, __ATOMIC_RELAXED); }"),
    Case(
        "release_reference",
        _FREE,
        "void @put(int *n) { if (__atomic_sub_fetch(n, 1, __ATOMIC_ACQ_REL) == 0) work(1); }",
    ),
    Case(
        "refer_unless_zero",
        _FREE,
        """
        bool @get(int *n) {
            int old = __atomic_load_n(n, __ATOMIC_RELAXED);
            do { if (old == 0) return false; }
            while (!__atomic_compare_exchange_n(n, &old, old + 1, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
            return true;
        }""",
    ),
    Case("set_bits", _FREE, "static int @n; void @mark(int v) { __atomic_fetch_or(&@n, v, __ATOMIC_RELAXED); }"),
    Case(
        "set_bits_and_read",
        _FREE,
        "static int @n; int @mark(int v) { return __atomic_fetch_or(&@n, v, __ATOMIC_RELAXED); }",
    ),
    Case("store", _FREE, "static int @n; void @set(int v) { __atomic_store_n(&@n, v, __ATOMIC_SEQ_CST); }"),
    Case("try_once", _FREE, "static int @w; bool @try(void) { return __sync_bool_compare_and_swap(&@w, 0, 1); }"),
    Case(
        "try_exchange",
        _FREE,
        "static int @w; bool @try(void) { return !__atomic_exchange_n(&@w, 1, __ATOMIC_ACQUIRE); }",
    ),
    Case("release", _FREE, "static int @w; void @drop(void) { __atomic_store_n(&@w, 0, __ATOMIC_RELEASE); }"),
    Case(
        "release_by_exchange",
        _FREE,
        "static int @w; void @drop(void) { if (__atomic_exchange_n(&@w, 0, __ATOMIC_RELEASE) == 2) work(1); }",
    ),
    Case(
        "install_once",
        _FREE,
        """
        static void *@p; void *@get(void *fresh) {
            void *none = 0;
            return __atomic_compare_exchange_n(&@p, &none, fresh, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) ? fresh : none;
        }""",
    ),
    Case(
        "read_sequence",
        _FREE,
        """
        static unsigned @s; static long @a, @b; long @read(void) {
            unsigned s; long a, b;
            do { s = __atomic_load_n(&@s, __ATOMIC_ACQUIRE); a = @a; b = @b; __atomic_thread_fence(__ATOMIC_ACQUIRE); }
            while (s & 1 || s != __atomic_load_n(&@s, __ATOMIC_RELAXED));
            return a + b;
        }""",
    ),
    Case(
        "count_in_loop",
        _FREE,
        "static long @n; void @hit(int *v, int c) { for (int i = 0; i < c; "
        "i++) __atomic_fetch_add(&@n, v[i], __ATOMIC_RELAXED); }",
    ),
    Case(
        "swap_in_loop",
        _FREE,
        """
        void @drain(void **slot, int c) {
            for (int i = 0; i < c; i++) { void *p = __atomic_exchange_n(&slot[i], (void *)0, __ATOMIC_ACQ_REL);
                if (p) work(1); }
        }""",
    ),
    Case(
        "claim_first_free",
        _FREE,
        """
        static int @slot[64]; int @claim(void) {
            for (int i = 0; i < 64; i++) if (!__atomic_exchange_n(&@slot[i], 1, __ATOMIC_ACQUIRE)) return i;
            return -1;
        }""",
    ),
    Case(
        "claim_by_cas",
        _FREE,
        """
        static int @slot[64]; int @claim(void) {
            for (int i = 0; i < 64; i++) if (__sync_bool_compare_and_swap(&@slot[i], 0, 1)) return i;
            return -1;
        }""",
    ),
    Case("trylock", _FREE, "static pthread_mutex_t @m; int @try(void) { return pthread_mutex_trylock(&@m); }"),
    Case("unlock", _FREE, "static pthread_mutex_t @m; void @drop(void) { pthread_mutex_unlock(&@m); work(1); }"),
    Case("wake", _FREE, "static int @w; void @wake(void) { @w = 0; syscall(SYS_futex, &@w, FUTEX_WAKE, 1, 0); }"),
    Case(
        "unlock_and_wake",
        _FREE,
        """
        static int @w; void @drop(void) {
            if (__atomic_exchange_n(&@w, 0, __ATOMIC_RELEASE) == 2) syscall(SYS_futex, &@w, FUTEX_WAKE, 1, 0);
        }""",
    ),
    Case(
        "plain_loop", _FREE, "int @sum(int *v, int c) { int s = 0; for (int i = 0; i < c; i++) s += v[i]; return s; }"
    ),
)

CASES = (*LOCKS, *LOCK_FREE)
#: How AArch64 does it: helpers that choose at run time (the default), exclusive pairs, and single instructions.
WAYS = (
    *BUILDS,
    *(Build("aarch64", (level, way)) for level in LEVELS for way in ("-mno-outline-atomics", "-march=armv8.1-a")),
)


def _verdict(case: Case, build: Build) -> str:
    found = table(CASES, build)
    names = {found.flow.name(f) for f in locks_of(found).evidence}
    return _LOCK if any(name.startswith(f"{case.name}__") for name in names) else _FREE


@pytest.mark.parametrize(("case", "build"), parameters(CASES, WAYS))
def test_takes_a_lock_that_waits(case: Case, build: Build) -> None:
    assert _verdict(case, build) == case.expected

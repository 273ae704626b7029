"""What becomes of a child: every way to test fork's result, through wrappers, at every optimisation level."""

from __future__ import annotations

import pytest

from tests.unit.analysis.snippets import BUILDS, Build, Case, parameters, table, windows_of

pytestmark = pytest.mark.together("build")

_BYTE = "a byte of a register that is set alone is not followed"

#: The result of fork is tested in the function that forks.
TESTED = (
    Case("equal", "exit", "int @main(void) { if (fork() == 0) { work(1); _exit(0); } return ask(); }"),
    Case("negated", "exit", "int @main(void) { if (!fork()) { work(1); _exit(0); } return ask(); }"),
    Case("assigned", "exit", "int @main(void) { pid_t p; if (!(p = fork())) { work(1); _exit(0); } return p; }"),
    Case("truth", "daemonize", "int @main(void) { if (fork()) _exit(0); work(1); return ask(); }"),
    Case("positive", "daemonize", "int @main(void) { if (fork() > 0) exit(0); work(1); return ask(); }"),
    Case("not_zero", "daemonize", "int @main(void) { if (fork() != 0) exit(0); work(1); return ask(); }"),
    Case("at_least_one", "daemonize", "int @main(void) { if (fork() >= 1) exit(0); work(1); return ask(); }"),
    Case("negative_only", "unknown|daemonize", "int @main(void) { if (fork() < 0) exit(1); work(1); return 0; }"),
    Case("never", "unknown|daemonize", "int @main(void) { fork(); work(1); return ask(); }"),
    Case(
        "both_tests",
        "daemonize",
        "int @main(void) { pid_t p = fork(); if (p < 0) exit(1); if (p > 0) exit(0); work(1); return ask(); }",
    ),
    Case(
        "three_ways",
        "exit",
        "int @main(void) { pid_t p = fork(); if (p < 0) return 1; if (p == 0) { work(1); _exit(0); } work(2); "
        "return 0; }",
    ),
    Case(
        "switched",
        "daemonize",
        """
        int @main(void) {
            switch (fork()) { case -1: return 1; case 0: break; default: _exit(0); }
            work(1); return ask();
        }""",
    ),
    Case(
        "switched_exec",
        "exec",
        """
        int @main(char **v) {
            switch (fork()) { case -1: return 1; case 0: execv(v[0], v); _exit(127); default: work(2); }
            return ask();
        }""",
    ),
    Case("ternary", "exit", "int @main(void) { return fork() ? ask() : (_exit(3), 0); }"),
    Case(
        "minus_one_first",
        "exec",
        "int @main(char **v) { pid_t p = fork(); if (p == -1) return 1; if (p == 0) { execvp(v[0], v); "
        "_exit(1); } return 0; }",
    ),
    Case(
        "in_global",
        "exit",
        "static volatile pid_t @pid; int @main(void) { @pid = fork(); if (@pid == 0) { work(1); _exit(0); "
        "} return ask(); }",
    ),
    Case(
        "in_exported_global",
        "exit",
        "volatile pid_t @pid; int @main(void) { @pid = fork(); if (@pid == 0) { work(1); _exit(0); } return ask(); }",
    ),
    Case(
        "in_field",
        "exit",
        """
        struct @job { int number; volatile pid_t pid; };
        int @main(struct @job *j) { j->pid = fork(); if (j->pid == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "in_element",
        "exit",
        """
        static volatile pid_t @pids[8];
        int @main(int i) { if ((@pids[i] = fork()) == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "in_volatile_local",
        "exit",
        "int @main(void) { volatile pid_t p = fork(); work(2); if (p == 0) { work(1); _exit(0); } return ask(); }",
    ),
    Case(
        "tested_after_calls",
        "exit",
        "int @main(void) { pid_t p = fork(); int e = errno; work(e); if (p == 0) { work(1); _exit(0); } return p; }",
    ),
    Case(
        "goto_cleanup",
        "exit",
        """
        int @main(void) {
            int r = 1; pid_t p = fork();
            if (p < 0) goto out;
            if (p == 0) { work(1); _exit(0); }
            r = 0;
        out: work(r); return r;
        }""",
    ),
    Case(
        "child_in_callee",
        "exit",
        "NOINLINE void @child(void) { work(1); _exit(0); } int @main(void) { if (fork() == 0) @child(); "
        "return ask(); }",
    ),
    Case(
        "child_two_deep",
        "exit",
        """
        NOINLINE void @die(int n) { work(n); exit(n); }
        NOINLINE void @child(void) { work(1); @die(0); }
        int @main(void) { if (fork() == 0) @child(); return ask(); }""",
    ),
    Case(
        "exec_in_callee",
        "exec",
        """
        NOINLINE void @child(char **v) { work(1); execvp(v[0], v); work(2); _exit(127); }
        int @main(char **v) { if (fork() == 0) @child(v); return ask(); }""",
    ),
    Case(
        "exec_helper_returns",
        "exec",
        """
        NOINLINE int @run(char **v) { execvp(v[0], v); return errno; }
        int @main(char **v) { if (fork() == 0) { int e = @run(v); work(e); _exit(127); } return ask(); }""",
    ),
    Case(
        "execl_after_dup2",
        "exec",
        """
        int @main(int fd) {
            pid_t p = fork();
            if (p == 0) { dup2(fd, 0); close(fd); execl("/bin/sh", "sh", "-c", "true", (char *)0); _exit(127); }
            int s; waitpid(p, &s, 0); return s;
        }""",
    ),
    Case(
        "fexecve",
        "exec",
        "int @main(int fd, char **v) { if (fork() == 0) { fexecve(fd, v, v); _exit(1); } return ask(); }",
    ),
    Case(
        "exec_unless",
        "exec",
        """
        int @main(char **v) {
            if (fork() == 0) { if (ask()) execv(v[0], v); else work(3); _exit(1); }
            return ask();
        }""",
    ),
    Case(
        "signal_death",
        "exit|daemonize",
        "int @main(void) { if (fork() == 0) { work(1); kill(getpid(), SIGKILL); for (;;) pause(); } return ask(); }",
    ),
    Case("aborts", "exit", "int @main(void) { if (fork() == 0) { work(1); abort(); } return ask(); }"),
    Case("quick", "exit", "int @main(void) { if (fork() == 0) { work(1); quick_exit(2); } return ask(); }"),
    Case(
        "cold_child",
        "exit",
        """
        COLD void @child(void) { work(1); _exit(1); }
        int @main(void) { pid_t p = fork(); if (unlikely(p == 0)) @child(); work(2); return ask(); }""",
    ),
    Case(
        "cold_part",
        "daemonize",
        """
        COLD void @report(int n) { work(n); }
        NOINLINE int @main(int a) {
            pid_t p = fork();
            if (unlikely(p < 0)) { @report(a); @report(errno); exit(1); }
            if (unlikely(p > 0)) { @report(p); @report(a); _exit(0); }
            work(1); return ask();
        }""",
    ),
    Case(
        "noreturn_without_attribute",
        "exit",
        """
        NOINLINE void @finish(int s) { work(s); _exit(s); }
        int @main(void) { pid_t p = fork(); if (p == 0) { work(1); @finish(0); } work(p); return ask(); }""",
    ),
    Case(
        "longjmp_out",
        "exit",
        "static jmp_buf @b; int @main(void) { if (fork() == 0) { if (!setjmp(@b)) longjmp(@b, 1); _exit(0); "
        "} return ask(); }",
    ),
)

#: Who lives on where.
SHAPES = (
    Case(
        "loops_for_ever",
        "daemonize",
        "int @main(void) { if (fork() == 0) for (;;) work(ask()); return ask(); }",
    ),
    Case(
        "prefork_exits",
        "exit",
        """
        int @main(void) {
            for (int i = 0; i < 8; i++) if (fork() == 0) { while (ask()) work(i); _exit(0); }
            while (wait(0) > 0) {}
            return 0;
        }""",
    ),
    Case(
        "prefork_returns",
        "daemonize|unknown",
        """
        int @main(void) {
            for (int i = 0; i < 8; i++) if (fork() == 0) { work(i); return ask(); }
            while (wait(0) > 0) {}
            exit(0);
        }""",
    ),
    Case(
        "prefork_breaks",
        "daemonize|unknown|exit",
        """
        int @main(void) {
            int i; for (i = 0; i < 8; i++) if (fork() == 0) break;
            if (i < 8) for (;;) work(i);
            while (wait(0) > 0) {}
            exit(0);
        }""",
    ),
    Case(
        "double_daemon",
        "daemonize daemonize",
        """
        int @main(void) {
            if (fork() > 0) _exit(0);
            setsid();
            if (fork() > 0) _exit(0);
            work(1); return ask();
        }""",
    ),
    Case(
        "double_daemon_callee",
        "daemonize daemonize",
        """
        NOINLINE void @daemonize(void) {
            if (fork() != 0) exit(0);
            setsid();
            if (fork() != 0) exit(0);
            umask(0);
        }
        int @main(void) { @daemonize(); for (;;) work(ask()); }""",
    ),
    Case(
        "waits_then_exits",
        "daemonize",
        """
        NOINLINE void @daemonize(void) {
            int fds[2]; char c; pid_t p;
            if (pipe(fds) == -1) exit(1);
            p = fork();
            if (p > 0) {
                int status; close(fds[1]);
                do { status = read(fds[0], &c, 1); } while (status < 0 && errno == EINTR);
                exit(status == 1 && c == 0 ? 0 : 1);
            } else if (p < 0) exit(1);
            close(fds[0]); setsid();
        }
        int @main(void) { @daemonize(); work(1); return ask(); }""",
    ),
    Case(
        "detached_exec",
        "exec exec|exec exit",
        """
        int @main(char **v) {
            pid_t p = fork();
            if (p == 0) { if (fork() == 0) { execv(v[0], v); _exit(1); } _exit(0); }
            int s; waitpid(p, &s, 0); return s;
        }""",
    ),
    Case(
        "recursive",
        "exit",
        """
        NOINLINE int @walk(int n) { if (n == 0) return 0; if (fork() == 0) { work(n); _exit(@walk(n - 1)); } return n; }
        int @main(void) { return @walk(3); }""",
    ),
    Case(
        "recursive_returning",
        "daemonize daemonize|daemonize",
        """
        NOINLINE void @become(int n) { if (fork() > 0) _exit(0); if (n) @become(n - 1); work(n); }
        int @main(void) { @become(1); work(2); return ask(); }""",
    ),
    Case(
        "parent_waits_and_returns",
        "exit",
        """
        int @main(void) {
            pid_t p = fork(); int s;
            if (p == 0) { work(1); exit(ask()); }
            while (waitpid(p, &s, 0) < 0 && errno == EINTR) {}
            return WEXITSTATUS(s);
        }""",
    ),
    Case(
        "both_return",
        "unknown|daemonize",
        "int @main(void) { pid_t p = fork(); work(p); return p; }",
    ),
    Case(
        "supervisor",
        "daemonize|exit",
        """
        NOINLINE void @serve(void) { for (;;) work(ask()); }
        int @main(void) {
            for (;;) { pid_t p = fork(); if (p == 0) @serve(); int s; waitpid(p, &s, 0); }
        }""",
    ),
)

#: The result is tested by a caller of the function that forks.
WRAPPED = (
    Case(
        "wrapper",
        "exit",
        """
        NOINLINE pid_t @fork(void) { pid_t p = fork(); work(p); return p; }
        int @main(void) { if (@fork() == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "wrapper_tail_call",
        "exec",
        """
        NOINLINE pid_t @fork(void) { return fork(); }
        int @main(char **v) { if (@fork() == 0) { execv(v[0], v); _exit(1); } return ask(); }""",
    ),
    Case(
        "wrapper_two_tail_calls",
        "daemonize",
        """
        NOINLINE pid_t @fork(void) { return fork(); }
        NOINLINE pid_t @again(void) { return @fork(); }
        int @main(void) { if (@again() > 0) _exit(0); work(1); return ask(); }""",
    ),
    Case(
        "wrapper_dies_on_failure",
        "exit",
        """
        NOINLINE void @die(const char *s) { perror(s); exit(1); }
        NOINLINE pid_t @xfork(void) { pid_t p = fork(); if (p < 0) @die("fork"); return p; }
        int @main(void) { if (@xfork() == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "wrapper_minus_one",
        "daemonize",
        """
        NOINLINE int @fork(void) { pid_t p = fork(); if (p < 0) { work(errno); return -1; } return p; }
        int @main(void) { int p = @fork(); if (p == -1) return 1; if (p) exit(0); work(1); return ask(); }""",
    ),
    Case(
        "wrapper_bool",
        "exit",
        """
        NOINLINE bool @is_child(void) { return fork() == 0; }
        int @main(void) { if (@is_child()) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "wrapper_bool_branch",
        "daemonize",
        """
        NOINLINE bool @in_parent(void) { if (fork() > 0) { work(2); return true; } work(3); return false; }
        int @main(void) { if (@in_parent()) _exit(0); work(1); return ask(); }""",
        wrong=_BYTE,
        wrong_in=("x86_64-Os",),
    ),
    Case(
        "wrapper_enum",
        "exec",
        """
        NOINLINE int @spawn(void) { pid_t p = fork(); if (p < 0) return 3; if (p == 0) return 7; work(p); return 9; }
        int @main(char **v) { switch (@spawn()) { case 7: execv(v[0], v); _exit(1); case 9: work(2);
            } return ask(); }""",
    ),
    Case(
        "wrapper_sets_up_child",
        "exec",
        """
        NOINLINE pid_t @fork(void) {
            pid_t p = fork();
            if (p == 0) { setsid(); work(1); return 0; }
            if (p > 0) work(p);
            return p;
        }
        int @main(char **v) { if (!@fork()) { execvp(v[0], v); _exit(1); } return ask(); }""",
    ),
    Case(
        "wrapper_out_parameter",
        "exit|unknown",
        """
        NOINLINE int @spawn(pid_t *out) { *out = fork(); return *out < 0 ? -1 : 0; }
        int @main(void) { pid_t p; if (@spawn(&p)) return 1; if (p == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "wrapper_field_of_result",
        "exec",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE struct @child *@start(void) {
            struct @child *c = malloc(sizeof *c); c->id = ask(); c->pid = fork(); work(c->id); return c;
        }
        int @main(char **v) {
            struct @child *c = @start(); work(c->id);
            if (c->pid == 0) { execv(v[0], v); _exit(1); }
            return ask();
        }""",
        wrong="a register that still holds the object at a call counts as its argument",
        wrong_in=("x86_64-O0",),
    ),
    Case(
        "wrapper_field_of_result_twice",
        "exit",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE struct @child *@start(int id) {
            struct @child *c = malloc(sizeof *c); c->id = id; c->pid = fork(); work(id); return c;
        }
        NOINLINE struct @child *@begin(int id) { struct @child *c = @start(id + 1); work(c->id); return c; }
        int @main(void) { struct @child *c = @begin(3); if (!c->pid) { work(1); _exit(0); } return ask(); }""",
        wrong="a register that still holds the object at a call counts as its argument",
        wrong_in=("x86_64-O0",),
    ),
    Case(
        "wrapper_field_of_argument",
        "exit",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE void @start(struct @child *c) { c->pid = fork(); work(c->id); }
        NOINLINE void @begin(int id, struct @child *c) { c->id = id; @start(c); work(c->id); }
        int @main(struct @child *c) {
            struct @child mine; @begin(2, &mine); if (mine.pid == 0) { work(1); work(ask()); _exit(0); } return ask();
        }""",
        wrong="a register that still holds the object at a call counts as its argument",
        wrong_in=("x86_64-O0",),
    ),
    Case(
        "wrapper_field_of_argument_passed_on",
        "exit",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE void @start(struct @child *c) { c->pid = fork(); work(c->id); }
        NOINLINE void @begin(int id, struct @child *c) { work(id); @start(c); }
        int @main(struct @child *c) {
            @begin(2, c); if (c->pid == 0) { work(1); work(ask()); _exit(0); } return ask();
        }""",
        wrong="a register that still holds the object at a call counts as its argument",
        wrong_in=("x86_64-O0",),
    ),
    Case(
        "wrapper_global",
        "unknown",
        """
        static pid_t @pid;
        NOINLINE void @start(void) { @pid = fork(); work(2); }
        int @main(void) { @start(); if (@pid == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "wrapper_field_parent_exits",
        "daemonize",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE void @start(struct @child *c) { c->pid = fork(); work(c->id); }
        int @main(struct @child *c) { @start(c); if (c->pid > 0) _exit(0); work(1); return ask(); }""",
        wrong="a register that still holds the object at a call counts as its argument",
        wrong_in=("x86_64-O0",),
    ),
    Case(
        "wrapper_field_set_anew",
        "unknown",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE void @start(struct @child *c) { c->pid = fork(); work(c->id); c->pid = ask(); }
        int @main(struct @child *c) { @start(c); if (c->pid == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "wrapper_field_passed_to_others",
        "unknown",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE void @start(struct @child *c) { c->pid = fork(); work(2); }
        NOINLINE void @set(struct @child *c) { c->pid = ask(); }
        int @main(struct @child *c) { @start(c); @set(c); if (c->pid == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "wrapper_field_of_another_object",
        "exec",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE struct @child *@start(void) {
            struct @child *c = malloc(sizeof *c); if (!c) _exit(1); c->pid = fork(); return c;
        }
        int @main(char **v) { for (;;) if (@start()->pid > 0) { execv(v[0], v); _exit(1); } else work(1); }""",
    ),
    Case(
        "wrapper_field_of_the_next_object",
        "exec",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE struct @child *@next(void) { return (struct @child *)(long)ask(); }
        NOINLINE void @start(struct @child *c) { c->pid = fork(); work(2); }
        int @main(char **v) {
            for (struct @child *c, *last = 0;; last = c) {
                c = @next(); if (c != last && ask()) { execv(v[0], v); _exit(1); } @start(c);
            }
        }""",
    ),
    Case(
        "wrapper_field_of_one_of_two",
        "exec",
        """
        struct @child { int id; pid_t pid; };
        NOINLINE void @start(struct @child *c) { c->pid = fork(); work(2); }
        NOINLINE void @begin(struct @child *a, struct @child *b) { if (ask()) @start(a); else @start(b); }
        int @main(struct @child *a, struct @child *b, char **v) {
            @begin(a, b); if (a->pid) { execv(v[0], v); _exit(1); } for (;;) work(1);
        }""",
    ),
    Case(
        "wrapper_field_forked_again",
        "exec",
        """
        struct @child { int id; pid_t pid; } *@all;
        NOINLINE void @start(struct @child *c) { c->pid = fork(); work(2); }
        NOINLINE void @again(void) { @start(@all); work(3); }
        int @main(struct @child *c, char **v) {
            @start(c); @again(); if (c->pid) { execv(v[0], v); _exit(1); } for (;;) work(1);
        }""",
    ),
    Case(
        "wrapper_two_results",
        "exec",
        """
        NOINLINE pid_t @fork(void) { pid_t p = fork(); work(1); return p; }
        NOINLINE int @start(void) { if (ask()) return @fork(); return @fork() == 0 ? 7 : 8; }
        int @main(char **v) { if (@start() == 7) { execv(v[0], v); _exit(1); } for (;;) work(1); }""",
    ),
    Case(
        "wrapper_deep",
        "exit",
        """
        NOINLINE pid_t @a(void) { pid_t p = fork(); work(1); return p; }
        NOINLINE pid_t @b(void) { pid_t p = @a(); work(2); return p; }
        NOINLINE pid_t @c(void) { pid_t p = @b(); work(3); return p; }
        int @main(void) { if (@c() == 0) { work(1); _exit(0); } return ask(); }""",
    ),
    Case(
        "wrapper_two_callers",
        "exec",
        """
        NOINLINE pid_t @fork(void) { pid_t p = fork(); work(p); return p; }
        NOINLINE int @one(char **v) { if (@fork() == 0) { execv(v[0], v); _exit(1); } return ask(); }
        NOINLINE int @two(char **v) { if (@fork() == 0) { execv(v[1], v); _exit(1); } return ask(); }
        int @main(char **v) { return @one(v) + @two(v); }""",
    ),
    Case(
        "daemonize_returning_status",
        "daemonize",
        """
        NOINLINE int @daemonize(void) {
            pid_t p = fork();
            if (p < 0) return -1;
            if (p > 0) exit(0);
            if (setsid() < 0) return -1;
            return 0;
        }
        int @main(void) { if (@daemonize()) return 1; work(1); return ask(); }""",
    ),
)

#: Other ways to create a process.
FORKERS = (
    Case("daemon", "daemonize", "int @main(void) { if (daemon(0, 0)) return 1; work(1); return ask(); }"),
    Case(
        "forkpty",
        "exec",
        "int @main(char **v) { int m; if (forkpty(&m, 0, 0, 0) == 0) { execv(v[0], v); _exit(1); } return ask(); }",
    ),
    Case("vfork", "exec", "int @main(char **v) { if (vfork() == 0) { execv(v[0], v); _exit(1); } return ask(); }"),
    Case("_Fork", "exit", "int @main(void) { if (_Fork() == 0) { work(1); _exit(0); } return ask(); }"),
    Case("system", "spawn", 'int @main(void) { return system("true"); }'),
    Case("popen", "spawn", 'int @main(void) { return popen("true", "r") != 0; }'),
    Case(
        "posix_spawn",
        "spawn",
        "int @main(char **v) { pid_t p; return posix_spawn(&p, v[0], 0, 0, v, v); }",
    ),
    Case(
        "syscall_clone",
        "exit",
        "int @main(void) { if (syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) == 0) { work(1); _exit(0); } return ask(); }",
    ),
    Case(
        "syscall_fork",
        "exit",
        "int @main(void) { if (syscall(SYS_fork) == 0) { work(1); _exit(0); } return ask(); }",
        only=("x86_64",),
    ),
    Case(
        "inline_fork",
        "exit",
        """
        static inline long @raw(void) { long r;
            asm volatile("syscall" : "=a"(r) : "a"(57L) : "rcx", "r11", "memory"); return r; }
        int @main(void) { if (@raw() == 0) { work(1); _exit(0); } return ask(); }""",
        only=("x86_64",),
    ),
    Case(
        "inline_clone",
        "exit",
        """
        static inline long @raw(long flags) {
            register long n asm("x8") = 220, a asm("x0") = flags, b asm("x1") = 0, c asm("x2") = 0, d asm("x3")
                = 0, e asm("x4") = 0;
            asm volatile("svc #0" : "+r"(a) : "r"(n), "r"(b), "r"(c), "r"(d), "r"(e) : "memory"); return a;
        }
        int @main(void) { if (@raw(SIGCHLD) == 0) { work(1); _exit(0); } return ask(); }""",
        only=("aarch64",),
    ),
    Case(
        "thread_is_no_process",
        "",
        """
        int @main(void *stack) {
            return syscall(SYS_clone, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD, stack, 0, 0, 0);
        }""",
    ),
    Case(
        "clone_function",
        "exit",
        """
        NOINLINE int @child(void *p) { work(1); return 0; }
        int @main(char *stack) { return clone(@child, stack, SIGCHLD, 0); }""",
    ),
    Case(
        "clone_function_exec",
        "exec",
        """
        NOINLINE int @child(void *p) { execv("/bin/true", p); return 1; }
        int @main(char *stack) { return clone(@child, stack, SIGCHLD, stack); }""",
    ),
    Case(
        "other_syscall",
        "",
        "int @main(void) { return syscall(SYS_gettid) == 0 ? 1 : (int)syscall(SYS_getpid); }",
    ),
)

CASES = (*TESTED, *SHAPES, *WRAPPED, *FORKERS)


def _kinds(case: Case, build: Build) -> str:
    return " ".join(sorted(w.window.kind.value for w in windows_of(table(CASES, build), case)))


#: Calls through the GOT (on x86-64; AArch64 code may load the word too far from the call), landing pads and signed
#: returns, and parts of functions that are moved away.
WAYS = (
    Build("x86_64").also("-fno-plt"),
    Build("x86_64").also("-fcf-protection=full"),
    Build("x86_64").also("-freorder-blocks-and-partition"),
    Build("aarch64").also("-mbranch-protection=standard"),
)


@pytest.mark.parametrize(("case", "build"), parameters(CASES, (*BUILDS, *WAYS)))
def test_what_becomes_of_the_child(case: Case, build: Build) -> None:
    assert _kinds(case, build) in case.expected.split("|")

/* What a program under the probe may do to its tracer, by its arguments. A thread takes and gives a lock of the
 * allocator all the time, so that there is something to steer; so does the child of "late", which hangs for it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile int working;

static void nothing(int number)
{
    (void)number;
}

static void *work(void *unused)
{
    for (;; working = 1) {
        void *volatile pointer = malloc(64); /* or the compiler removes the pair */
        free(pointer);
    }
    return unused;
}

static void child_of_fork(int rounds)
{
    while (rounds--) {
        pid_t pid = fork();
        if (pid == 0)
            _exit(0);
        waitpid(pid, NULL, 0);
    }
}

/* Every system call is asked about, and getppid refused. */
static void filter(void)
{
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof rules / sizeof *rules, rules};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        _exit(3);
}

/* A child that nobody traces, and that outlives everyone. */
static void escape(void)
{
    if (syscall(SYS_clone, CLONE_UNTRACED | SIGCHLD, 0, 0, 0, 0) == 0) {
        setsid();
        for (;;)
            pause();
    }
}

/* A child that is to be traced by this process, as a debugger does. */
static void attach(void)
{
    pid_t pid = fork();
    if (pid == 0)
        for (;;)
            pause();
    ptrace(PTRACE_ATTACH, pid, 0, 0);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

/* Signals without end, to every thread. */
static void storm(void)
{
    struct itimerval often = {{0, 5000}, {0, 5000}};
    signal(SIGALRM, nothing);
    setitimer(ITIMER_REAL, &often, NULL);
}

/* Children that keep the thread that made them waiting. */
static void *vforks(void *unused)
{
    for (;;)
        if (vfork() == 0) {
            usleep(300000);
            _exit(0);
        }
    return unused;
}

static void *forks(void *unused)
{
    child_of_fork(2);
    _exit(0);
    return unused;
}

/* An acquire that faults: the lock's pointer is bad. */
__attribute__((noinline)) static void faulty(int *lock)
{
    int expected = 0;
    __atomic_compare_exchange_n(lock, &expected, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    pthread_t thread;
    pthread_create(&thread, NULL, work, NULL);
    while (!working)
        sched_yield();
    if (!strcmp(what, "crash"))
        *(volatile int *)0 = 1;
    if (!strcmp(what, "exec"))
        execl("/bin/true", "true", (char *)0);
    if (!strcmp(what, "ignore"))
        for (int s = 1; s < 32; s++)
            signal(s, SIG_IGN);
    if (!strcmp(what, "stop"))
        raise(SIGSTOP);
    if (!strcmp(what, "vfork") && vfork() == 0)
        _exit(0);
    if (!strcmp(what, "seccomp"))
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0);
    if (!strcmp(what, "ptrace"))
        ptrace(PTRACE_TRACEME, 0, 0, 0);
    if (!strcmp(what, "close"))
        for (int fd = 0; fd < 1024; fd++)
            close(fd);
    if (!strcmp(what, "killed"))
        kill(getpid(), SIGKILL);
    if (!strcmp(what, "forever"))
        for (;;)
            sched_yield();
    if (!strcmp(what, "fault"))
        faulty((int *)8);
    if (!strcmp(what, "many"))
        child_of_fork(1000);
    if (!strcmp(what, "filter"))
        filter();
    if (!strcmp(what, "escape"))
        escape();
    if (!strcmp(what, "attach"))
        attach();
    if (!strcmp(what, "storm"))
        storm();
    if (!strcmp(what, "undumpable"))
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    if (!strcmp(what, "setuid") && (setgid(65534) != 0 || setuid(65534) != 0))
        _exit(3);
    if (!strcmp(what, "orphans"))
        for (int i = 0; i < 20; i++)
            if (fork() == 0) {
                setsid();
                for (;;)
                    pause();
            }
    if (!strcmp(what, "vforks"))
        pthread_create(&thread, NULL, vforks, NULL);
    if (!strcmp(what, "leaves")) {
        pthread_create(&thread, NULL, forks, NULL);
        pthread_exit(NULL);
    }
    if (!strcmp(what, "execs") && argc < 3)
        execl("/proc/self/exe", argv[0], what, "again", (char *)0);
    child_of_fork(2);
    _exit(0);
}

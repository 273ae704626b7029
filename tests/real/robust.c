/* What a program under the probe may do to its tracer, by its first argument. A thread takes and gives a lock of the
 * allocator all the time, so that there is something to steer. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile int working;

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
    if (!strcmp(what, "many"))
        child_of_fork(1000);
    child_of_fork(2);
    _exit(0);
}

/* How often does a child of fork() hang in malloc while three other threads of its parent allocate?
 *
 *     allocator_stress FORKS MAX_HANGS      prints "forks=N hangs=M", and ends with 0
 *
 * The worst that can be done to an allocator: nobody pauses between allocations, sizes go through all classes, and
 * memory travels from thread to thread. A child allocates and frees a little and leaves with _exit; one that has not
 * done so after 2 s hangs, and is killed. The allocator is whatever the dynamic linker was told to preload.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SLOTS = 256, THREADS = 3, LIMIT_MS = 2000 };

static _Atomic(void *) shared[SLOTS];

static uint32_t next(uint32_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 17;
    *seed ^= *seed << 5;
    return *seed;
}

/* Mostly small, at times large: every size class, and the page heap. */
static void once(uint32_t *seed)
{
    uint32_t number = next(seed);
    size_t size = number % 64 ? number % 2048 : number % 300000;
    char *fresh = malloc(size + 1);
    if (fresh)
        *fresh = 1;
    free(atomic_exchange(&shared[next(seed) % SLOTS], fresh));
}

static void *churn(void *seed)
{
    uint32_t own = (uint32_t)(uintptr_t)seed;
    for (;;)
        once(&own);
    return NULL;
}

static void child(uint32_t seed)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* who kills us leaves no hung child behind */
    for (int i = 0; i < 300; i++)
        once(&seed);
    _exit(0);
}

/* True when the child has not ended within the limit: its end of the pipe is still open. */
static int hangs(int reader, pid_t pid)
{
    struct pollfd end = {.fd = reader, .events = POLLIN};
    int hung = poll(&end, 1, LIMIT_MS) == 0;
    if (hung)
        kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    return hung;
}

int main(int argc, char **argv)
{
    uint32_t seed = 88172645;
    int forks = argc > 1 ? atoi(argv[1]) : 200, most = argc > 2 ? atoi(argv[2]) : 200, done = 0, hung = 0;
    for (uintptr_t i = 1; i <= THREADS; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, churn, (void *)(i * 2654435761u)))
            return 1;
    }
    usleep(50000);
    while (done < forks && hung < most) {
        int ends[2];
        if (pipe(ends))
            return 1;
        pid_t pid = fork();
        if (pid < 0)
            return 1;
        if (pid == 0)
            child((uint32_t)(done + 1) * 40503u);
        close(ends[1]);
        hung += hangs(ends[0], pid);
        close(ends[0]);
        done++;
        for (int i = 0; i < 100; i++)
            once(&seed); /* the forking thread has memory of its own, which the others free */
    }
    char line[64];
    int length = snprintf(line, sizeof line, "forks=%d hangs=%d\n", done, hung);
    _exit(write(1, line, (size_t)length) != length);
}

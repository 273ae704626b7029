/* Children that wait for a lock which they did not have at their fork, and what becomes of that: for probes, of which
   each run takes one way. What a scan says of the functions is the same for all ways. */
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define OWN __attribute__((noinline))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int word;
static struct {
    pthread_mutex_t idle, busy;
} pair = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER};
static sem_t has, forked;
static const char *way;

static int is(const char *name)
{
    return strcmp(way, name) == 0;
}

OWN static void nap(long milliseconds)
{
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&time, NULL);
}

OWN int take(const char *how)
{
    if (strcmp(how, "timed") == 0) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 2;
        return pthread_mutex_timedlock(&lock, &until);
    }
    if (strcmp(how, "tried") == 0) {
        for (int i = 0; i < 200; i++, nap(10))
            if (pthread_mutex_trylock(&lock) == 0)
                return 0;
        return 1;
    }
    if (strcmp(how, "timer") == 0)
        alarm(2);
    return pthread_mutex_lock(&lock);
}

OWN void give(void)
{
    pthread_mutex_unlock(&lock);
}

/* Without a pause: for ever, until it has counted to what takes about a second, or until a clock says so. */
OWN int spin_busily(void)
{
    time_t end = time(NULL) + 2;
    if (is("spin-bare"))
        while (atomic_exchange(&word, 1))
            ;
#if defined(__x86_64__)
    if (is("spin-ticked"))
        for (unsigned long last = __builtin_ia32_rdtsc() + 3000000000; atomic_exchange(&word, 1);)
            if (__builtin_ia32_rdtsc() > last)
                return 1;
#endif
    for (long i = 0; atomic_exchange(&word, 1); i++)
        if (is("spin-counted") ? i == 100000000 : time(NULL) > end)
            return 1;
    return 0;
}

OWN int spin(int is_bounded)
{
    for (int i = 0; atomic_exchange(&word, 1); i++, nap(10))
        if (is_bounded && i == 200)
            return 1;
    return 0;
}

static void *frees(void *unused)
{
    nap(1500);
    give();
    return unused;
}

OWN pid_t fork_locking(void)
{
    pid_t child = fork();
    if (child == 0) {
        pthread_t other;
        if (is("freed"))
            pthread_create(&other, NULL, frees, NULL);
        if (take(way))
            _exit(1);
        give();
        _exit(0);
    }
    return child;
}

OWN pid_t fork_spinning(int is_busy)
{
    pid_t child = fork();
    if (child == 0) {
        if (is_busy ? spin_busily() : spin(is("spin-bounded")))
            _exit(1);
        word = 0;
        _exit(0);
    }
    return child;
}

OWN pid_t fork_holding(int is_held)
{
    if (is_held)
        take("");
    pid_t child = fork();
    if (is_held)
        give();
    if (child == 0) {
        take("");
        give();
        _exit(0);
    }
    return child;
}

OWN pid_t fork_beside(void)
{
    pid_t child = fork();
    if (child == 0) {
        pthread_mutex_lock(&pair.idle);
        pthread_mutex_unlock(&pair.idle);
        pthread_mutex_lock(&pair.busy);
        pthread_mutex_unlock(&pair.busy);
        _exit(0);
    }
    return child;
}

OWN pid_t fork_while_kept(void)
{
    sem_wait(&has);
    pid_t child = fork();
    if (child == 0) {
        take("");
        give();
        _exit(0);
    }
    sem_post(&forked);
    return child;
}

static void *works(void *unused)
{
    for (;; sched_yield()) {
        take("");
        give();
        spin(0);
        word = 0;
        pthread_mutex_lock(&pair.busy);
        pthread_mutex_unlock(&pair.busy);
        if (is("never")) {
            pthread_mutex_lock(&pair.idle);
            pthread_mutex_unlock(&pair.idle);
        }
    }
    return unused;
}

static void *keeps(void *unused)
{
    take("");
    sem_post(&has);
    sem_wait(&forked);
    give();
    for (;;)
        pause();
    return unused;
}

static void await(pid_t child)
{
    waitpid(child, NULL, 0);
}

int main(int count, char **arguments)
{
    pthread_t thread;
    way = count > 1 ? arguments[1] : "";
    if (is("kept")) {
        pthread_create(&thread, NULL, keeps, NULL);
        await(fork_while_kept());
        return 0;
    }
    pthread_create(&thread, NULL, works, NULL);
    nap(3);
    if (is("fifth") || is("all"))
        for (int i = 1; i <= 5; i++)
            await(fork_holding(is("all") || i < 5));
    else if (is("beside"))
        await(fork_beside());
    else if (strncmp(way, "spin", 4) == 0)
        await(fork_spinning(strcmp(way, "spin") != 0 && !is("spin-bounded")));
    else
        await(fork_locking());
    return 0;
}

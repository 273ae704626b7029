/* Does a function of libc hang in the child of a threaded process? Two threads call it without pause, the main thread
 * forks up to FORKS times, and each child calls it twice. Usage: libc_stress FUNCTION; without one, lists them.
 *
 * Prints "ok N" after N forks, or "hang H N" after H hangs in N forks; a child hangs if it has not ended after LIMIT
 * seconds. The functions are those that programs call, with arguments that need neither network nor files of their own.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <grp.h>
#include <iconv.h>
#include <libintl.h>
#include <link.h>
#include <locale.h>
#include <mqueue.h>
#include <netdb.h>
#include <pthread.h>
#include <pwd.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>
#include <utmpx.h>
#include <wchar.h>

#if !defined(__GLIBC__)
#define mallopt(option, value) 0 /* musl has none */
#else
extern int mallopt(int, int);
#endif

#define FORKS 200
#define HANGS 2
#define LIMIT 2

static FILE *null;

#define F(name, ...) static void f_##name(void) { __VA_ARGS__; }
static void nothing(int number) { (void)number; }
static int each(struct dl_phdr_info *info, size_t size, void *data) { (void)info; (void)size; (void)data; return 0; }
static void *thread_body(void *unused) { return unused; }

F(getpid, getpid())
F(write, (void)!write(fileno(null), "x", 1))
F(malloc, free(malloc(100)))
F(calloc, free(calloc(7, 100)))
F(realloc, free(realloc(malloc(10), 5000)))
F(mallopt, mallopt(-3, 1 << 20))
F(fopen, FILE *f = fopen("/dev/null", "r"); if (f) fclose(f))
F(fprintf, fprintf(null, "%d %s\n", 5, "x"))
F(fputs, fputs("x", null))
F(fflush, fflush(null))
F(fflush_all, fflush(NULL))
F(puts_snprintf, char b[64]; snprintf(b, sizeof b, "%d %f", 5, 2.5))
F(fputwc, static __thread FILE *w; if (!w) w = fopen("/dev/null", "w"); fputwc(L'x', w))
F(popen, FILE *f = popen("true", "r"); if (f) pclose(f))
F(opendir, DIR *d = opendir("/"); if (d) { readdir(d); closedir(d); })
F(getenv, getenv("PATH"))
F(setenv, setenv("FORKPROOF", "x", 1))
F(putenv, static char text[] = "FORKPROOF_P=1"; putenv(text))
F(unsetenv, unsetenv("FORKPROOF_U"))
F(tzset, tzset())
F(localtime, time_t t = 0; localtime(&t))
F(localtime_r, time_t t = 0; struct tm m; localtime_r(&t, &m))
F(gmtime_r, time_t t = 0; struct tm m; gmtime_r(&t, &m))
F(ctime_r, time_t t = 0; char b[64]; ctime_r(&t, b))
F(mktime, struct tm m = {.tm_mday = 1, .tm_year = 100}; mktime(&m))
F(strftime, struct tm m = {.tm_mday = 1, .tm_year = 100}; char b[64]; strftime(b, sizeof b, "%c %Z", &m))
F(setlocale, setlocale(LC_ALL, "C"))
F(setlocale_query, setlocale(LC_ALL, NULL))
F(newlocale, locale_t l = newlocale(LC_ALL_MASK, "C", NULL); if (l) freelocale(l))
F(gettext, gettext("some text"))
F(textdomain, textdomain("forkproof"))
F(strerror, strerror(2))
F(strtok, char b[] = "a b"; strtok(b, " "))
F(strtod, strtod("2.5", NULL))
F(iconv_open, iconv_t c = iconv_open("UTF-8", "ISO-8859-1"); if (c != (iconv_t)-1) iconv_close(c))
F(syslog, syslog(LOG_DEBUG, "x"))
F(openlog, openlog("forkproof", 0, LOG_USER))
F(setlogmask, setlogmask(0xff))
F(random, random())
F(rand, rand())
F(srandom, srandom(1))
F(drand48, drand48())
F(getpwnam, getpwnam("root"))
F(getpwnam_r, struct passwd p, *q; char b[4096]; getpwnam_r("root", &p, b, sizeof b, &q))
F(getpwuid, getpwuid(0))
F(getgrnam, getgrnam("root"))
F(getgrgid_r, struct group g, *q; char b[4096]; getgrgid_r(0, &g, b, sizeof b, &q))
F(getservbyname, getservbyname("http", "tcp"))
F(getprotobyname, getprotobyname("tcp"))
F(gethostbyname, gethostbyname("localhost"))
F(getaddrinfo, struct addrinfo *a, h = {.ai_flags = AI_NUMERICHOST}; if (!getaddrinfo("127.0.0.1", "80", &h, &a)) freeaddrinfo(a))
F(getaddrinfo_config, struct addrinfo *a, h = {.ai_flags = AI_ADDRCONFIG}; if (!getaddrinfo("localhost", "80", &h, &a)) freeaddrinfo(a))
F(setutxent, setutxent())
F(atexit, static __thread int n; if (n++ < 1000) atexit(tzset))
F(pthread_atfork, static __thread int n; if (n++ < 1000) pthread_atfork(NULL, NULL, NULL))
F(dl_iterate_phdr, dl_iterate_phdr(each, NULL))
F(dlopen, void *h = dlopen("libm.so.6", RTLD_NOW); if (h) dlclose(h))
F(dlsym, dlsym(RTLD_DEFAULT, "read"))
F(dladdr, Dl_info i; dladdr((void *)f_dlsym, &i))
F(sigaction, struct sigaction a = {.sa_handler = nothing}; sigaction(SIGUSR1, &a, NULL))
F(sigaction_abort, struct sigaction a = {.sa_handler = nothing}; sigaction(SIGABRT, &a, NULL))
F(pthread_create, pthread_t t; if (!pthread_create(&t, NULL, thread_body, NULL)) pthread_join(t, NULL))
F(pthread_key_create, pthread_key_t k; if (!pthread_key_create(&k, NULL)) pthread_key_delete(k))
F(sem_open, sem_t *s = sem_open("/forkproof-stress", O_CREAT, 0600, 1); if (s != SEM_FAILED) sem_close(s))
F(mq_open, mqd_t q = mq_open("/forkproof-stress", O_CREAT | O_RDWR, 0600, NULL); if (q != (mqd_t)-1) mq_close(q))
F(timer_create, timer_t t; struct sigevent e = {.sigev_notify = SIGEV_NONE}; if (!timer_create(CLOCK_REALTIME, &e, &t)) timer_delete(t))

#define R(name) {#name, f_##name}
static const struct row { const char *name; void (*call)(void); } rows[] = {
    R(getpid), R(write), R(malloc), R(calloc), R(realloc), R(mallopt), R(fopen), R(fprintf), R(fputs), R(fflush),
    R(fflush_all), R(puts_snprintf), R(fputwc), R(popen), R(opendir), R(getenv), R(setenv), R(putenv), R(unsetenv),
    R(tzset), R(localtime), R(localtime_r), R(gmtime_r), R(ctime_r), R(mktime), R(strftime), R(setlocale),
    R(setlocale_query), R(newlocale), R(gettext), R(textdomain), R(strerror), R(strtok), R(strtod), R(iconv_open),
    R(syslog), R(openlog), R(setlogmask), R(random), R(rand), R(srandom), R(drand48), R(getpwnam), R(getpwnam_r),
    R(getpwuid), R(getgrnam), R(getgrgid_r), R(getservbyname), R(getprotobyname), R(gethostbyname), R(getaddrinfo),
    R(getaddrinfo_config), R(setutxent), R(atexit), R(pthread_atfork), R(dl_iterate_phdr), R(dlopen), R(dlsym),
    R(dladdr), R(sigaction), R(sigaction_abort), R(pthread_create), R(pthread_key_create), R(sem_open), R(mq_open),
    R(timer_create),
};

static void (*call)(void);
static volatile int working;

static void *loop(void *unused)
{
    for (;;) {
        call();
        working = 1;
    }
    return unused;
}

/* 1 if the child ended in time; one that did not is killed. */
static int ends(pid_t pid)
{
    struct timespec pause = {0, 1000000};
    for (int i = 0; i < LIMIT * 1000; i++) {
        if (waitpid(pid, NULL, WNOHANG) == pid)
            return 1;
        nanosleep(&pause, NULL);
    }
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    return 0;
}

int main(int count, char **words)
{
    int hangs = 0, forks = 0;
    null = fopen("/dev/null", "w");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (count < 2)
            puts(rows[i].name);
        else if (!strcmp(words[1], rows[i].name))
            call = rows[i].call;
    }
    if (!call)
        return count < 2 ? 0 : 2;
    for (int i = 0; i < 2; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, loop, NULL);
    }
    while (!working)
        ;
    while (forks < FORKS && hangs < HANGS) {
        pid_t pid = fork();
        if (pid == 0) {
            call();
            call();
            _exit(0);
        }
        forks++;
        hangs += !ends(pid);
    }
    if (hangs)
        printf("hang %d %d\n", hangs, forks);
    else
        printf("ok %d\n", forks);
    fflush(stdout);
    _exit(0);
}

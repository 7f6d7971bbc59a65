/* Signals belong to the program: no disposition but that of SIGBUS, mask or alternate stack is changed, its handlers get
 * their faults, and a signal to the process is never taken by a thread the program did not start. */
#include "check.h"
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

static sigjmp_buf back;
static void *volatile fault_address;
static volatile sig_atomic_t faults;
static pthread_t main_thread;
static atomic_int on_main, elsewhere;

static void on_fault(int signal, siginfo_t *info, void *context) {
    (void)context;
    fault_address = info->si_addr;
    faults++;
    siglongjmp(back, signal);
}

static void on_user(int signal) {
    (void)signal;
    atomic_fetch_add(pthread_equal(pthread_self(), main_thread) ? &on_main : &elsewhere, 1);
}

static void dispositions_are_default(const char *when) {
    for (int signal = 1; signal < NSIG; signal++) {
        struct sigaction action;
        /* SIGBUS tells of memory that a device took by force; the program's own handler comes after it. */
        if (signal == SIGALRM || signal == SIGBUS || sigaction(signal, NULL, &action) != 0) {
            continue;
        }
        CHECK(action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN, "%s, signal %d has a handler", when, signal);
    }
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    CHECK(sigismember(&mask, SIGSEGV) == 0 && sigismember(&mask, SIGBUS) == 0 && sigismember(&mask, SIGUSR1) == 0,
          "%s, the main thread blocks signals", when);
    stack_t stack;
    sigaltstack(NULL, &stack);
    CHECK(stack.ss_flags & SS_DISABLE, "%s, an alternate stack is set", when);
}

static void use_heap(void) {
    for (int i = 0; i < 200; i++) {
        size_t size = (size_t)(i + 1) * 20 * KIB;
        char *block = malloc(size);
        REQUIRE(block != NULL, "malloc(%zu) returned NULL", size);
        block[size - 1] = 1;
        free(block);
    }
}

static void faults_arrive(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    REQUIRE(sigaction(SIGSEGV, &action, NULL) == 0 && sigaction(SIGBUS, &action, NULL) == 0, "sigaction failed");
    use_heap();
    struct sigaction now;
    sigaction(SIGSEGV, NULL, &now);
    CHECK(now.sa_sigaction == on_fault, "the program's SIGSEGV handler was replaced");
    sigaction(SIGBUS, NULL, &now);
    CHECK(now.sa_sigaction == on_fault, "the program's SIGBUS handler was replaced");

    char *volatile guarded = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int signal = sigsetjmp(back, 1);
    if (signal == 0) {
        guarded[100] = 1;
    }
    CHECK(signal == SIGSEGV && fault_address == guarded + 100, "a bad write gave signal %d at %p", signal, fault_address);

    int file = open("/tmp", O_TMPFILE | O_RDWR, 0600);
    char *volatile beyond = mmap(NULL, 4096, PROT_READ, MAP_SHARED, file, 0);
    signal = sigsetjmp(back, 1);
    if (signal == 0) {
        (void)*(volatile char *)beyond;
    }
    CHECK(signal == SIGBUS && fault_address == beyond, "a read beyond a file gave signal %d at %p", signal, fault_address);
    CHECK(faults == 2, "%d faults arrived instead of 2", (int)faults);
    close(file);
}

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    main_thread = pthread_self();
    dispositions_are_default("at the start");
    use_heap();
    dispositions_are_default("after using the heap");

    /* Blocked here, a signal to the process stays pending unless a foreign thread takes it. */
    signal(SIGUSR1, on_user);
    sigset_t user;
    sigemptyset(&user);
    sigaddset(&user, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &user, NULL);
    kill(getpid(), SIGUSR1);
    use_heap();
    usleep(100 * 1000);
    CHECK(elsewhere == 0, "a thread that the program did not start took its signal");
    pthread_sigmask(SIG_UNBLOCK, &user, NULL);
    CHECK(on_main == 1, "the pending signal arrived %d times", on_main);

    faults_arrive();
    return check_result();
}

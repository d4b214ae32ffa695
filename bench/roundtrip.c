/* How far apart two cores are: a cache line's round trip between two pinned threads, by one flag. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

enum { NOBODY = 2 };        /* whose turn it is when the other thread could not be had */

struct player {
    int cpu, side, trips, pinned;
    double ns;
};

/* Alone on its line, and on the one that may be fetched with it. */
static _Alignas(256) struct { atomic_int turn; char rest[252]; } flag;

static void *play(void *argument)
{
    struct player *me = argument;
    struct timespec begin = {0, 0}, end;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(me->cpu, &cpus);
    me->pinned = pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus) == 0;
    for (int trip = 0; trip <= me->trips; trip++) {
        int turn;
        while ((turn = atomic_load_explicit(&flag.turn, memory_order_acquire)) != me->side)
            if (turn == NOBODY) return NULL;
        if (trip == 0) clock_gettime(CLOCK_MONOTONIC, &begin);      /* both are there */
        atomic_store_explicit(&flag.turn, !me->side, memory_order_release);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    me->ns = ((end.tv_sec - begin.tv_sec) * 1e9 + (end.tv_nsec - begin.tv_nsec)) / me->trips;
    return NULL;
}

/* Nanoseconds of one round trip, or a negative number where two pinned threads cannot be had. */
double round_trip_ns(int first, int second, int trips)
{
    struct player players[2] = {{first, 0, trips, 0, 0}, {second, 1, trips, 0, 0}};
    pthread_t threads[2];
    int made = 0;
    atomic_store(&flag.turn, 1);        /* the second begins; the first then knows it is there */
    while (made < 2 && pthread_create(&threads[made], NULL, play, &players[made]) == 0) made++;
    if (made < 2) atomic_store(&flag.turn, NOBODY);
    for (int i = 0; i < made; i++) pthread_join(threads[i], NULL);
    return made == 2 && players[0].pinned && players[1].pinned ? players[0].ns : -1;
}

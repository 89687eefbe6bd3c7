/*
 * mep_group_update: ranks go on in new windows, some of them as new processes. A model for spin;
 * what is in it and what is not, and how to run it: README.md here. Rounds are those of steps.pml,
 * always with a message, so that its flag does what a begin word does.
 *
 *   R  ranks; F  rounds in flight; BEFORE  rounds before the first update; UPDATES  so many calls
 *   by each rank, and AFTER  rounds after each, whether it succeeded or not
 *   REPLACEMENTS  so many of those that are lost have a new process when an update begins
 *   CRASHES       so many processes may stop for ever, at any step
 *   STOPS         so many may be taken for lost, at any step, and go on whenever they like
 *   SAFE          the first so many processes are never lost
 *   FAULTS        so many may fail in an update, and say so
 *   TIMEOUTS      so many waits may end although the peer is only slow
 *   STAR          members meet at the first of them, the hub, which answers one by one. Without
 *                 it all always hear the same, which no network can promise
 *   ONE_WORD      with STAR: how an update ends is a word in memory of all, written once
 *   MAY_SPLIT     an update may end differently for two that live, and then they mask each other
 *   BUG_...       what is planted, and has to be found
 */
#define S (2 * F)
#define WINDOW F
#define N (BEFORE + UPDATES * AFTER)
#define P (R + REPLACEMENTS)
#define NOBODY P  /* instead of a process: the rank has none */
#define NO_BEGIN_WORDS
#if P * (UPDATES + 1) * (N + 1) > 255
#error "a message has to fit a byte"
#endif

/* A generation is what an update leads to: 0 is the start, then the number of the update. */
byte named[(UPDATES + 1) * R];  /* [generation][rank]: its process */
byte member_count[UPDATES + 1]; /* 0: no member has begun the update */
byte process_of[R];             /* that a rank has now */
byte started = R;               /* so many processes */
bool lost[P + 1];               /* its peers' deadlines pass; if it only stopped, it may go on */
byte updates[P];                /* so many a process has begun */
byte generation[P];
bool kept[(UPDATES + 1) * P];   /* [update][process]: the update has failed for it */
byte masked[(UPDATES + 1) * P * R];  /* [generation][process][rank] */
byte crashes = CRASHES, stops = STOPS, faults = FAULTS, timeouts = TIMEOUTS;

#define PROCESS(rank) named[g * R + (rank)]
#define MASKED(me, peer) masked[(g * P + self) * R + (peer)]
#define FORGOTTEN 2  /* a mask that BUG_KEEPS_MASKS took over: for no reason in this generation */

/* In the windows of a generation: of each source and slot, the last round it has a word of. */
#if defined(BUG_OLD_WINDOWS)
#define MEMORY(owner) 0
#elif defined(BUG_REUSES_OLD) || defined(BUG_REUSES_NEW)
byte memory[(UPDATES + 1) * R];
#define MEMORY(owner) memory[g * R + (owner)]
#elif defined(BUG_OTHERS_ACTIVE)
#define MEMORY(owner) (PROCESS(owner) == NOBODY -> 0 : g)
#else
#define MEMORY(owner) g
#endif
#define PLACE(owner, source, m) (((MEMORY(owner) * R + (owner)) * R + (source)) * S + (m) % S)
byte payload[(UPDATES + 1) * R * R * S];
byte flag[(UPDATES + 1) * R * R * S];

#define TOKEN(from, to, m) true
#define MESSAGE(process, m) (((process) * (UPDATES + 1) + g) * (N + 1) + (m))
#define SENT(m) MESSAGE(self, m)
#define WHOLE(peer, m) MESSAGE(PROCESS(peer), m)

/* A process may be lost before any step. */
#define MAY_BE_LOST (self >= SAFE && !lost[self])
#define STEP                                                                             \
    if                                                                                   \
    :: atomic { MAY_BE_LOST && crashes > 0 -> crashes--; lost[self] = true }; goto gone  \
    :: atomic { MAY_BE_LOST && stops > 0 -> stops--; lost[self] = true }                 \
    :: true                                                                              \
    fi

/* Who is lost, has masked me, or has gone on to an update does not come. Nor does one for whom an
 * update has ended differently; without MAY_SPLIT only who is lost may see that. */
#define ENDED_APART(process) (kept[g * P + (process)] || generation[process] > g)
#if defined(MAY_SPLIT)
#define IS_APART(process) ENDED_APART(process)
#else
#define IS_APART(process) (lost[self] && ENDED_APART(process))
#endif
#define IS_GONE(process, peer)                                                         \
    (lost[process] || updates[process] > updates[self] || IS_APART(process) ||         \
     masked[(g * P + (process)) * R + me] == 1)
#define EXCUSED(peer) (PROCESS(peer) == NOBODY || IS_GONE(PROCESS(peer), peer))

/* Of any rank. */
#if R == 2
#define ANY(word) (word(0) || word(1))
#else
#define ANY(word) (word(0) || word(1) || word(2))
#endif

/* Who has lost a peer may leave the rounds for the next update. */
#define IS_MASKED(peer) MASKED(me, peer)
#if defined(BUG_IN_FLIGHT)
#define LEAVES (sent == last && updates[self] < UPDATES)
#else
#define LEAVES (oldest > sent && ANY(IS_MASKED) && updates[self] < UPDATES)
#endif
#include "steps.pml"

/* Of each update: */
byte hub[UPDATES + 1];            /* the process */
byte arrived[UPDATES + 1];        /* at all its gatherings so far */
byte passed[UPDATES + 1];         /* so many gatherings are complete, and all know; not for STAR */
byte answered[(UPDATES + 1) * R]; /* so many are, and the hub has told this rank */
bool left[UPDATES + 1];           /* a member has given up */
byte highest[UPDATES + 1];        /* epoch that a member has used */
byte decided[UPDATES + 1];        /* for ONE_WORD */
#define UNDECIDED 0
#define COMPLETE 1
#define INCOMPLETE 2

#define MEMBER(rank) named[u * R + (rank)]
#define IS_LOST(rank) lost[MEMBER(rank)]

inline name_members() {
    peer = 0;
    do
    :: peer < R ->
       if
       :: process_of[peer] == NOBODY || lost[process_of[peer]] ->
          process_of[peer] = NOBODY;
          if
          :: started < P ->
             updates[started] = u - 1;
             process_of[peer] = started;
             run Process(started, peer);
             started++
          :: else
          fi
       :: else
       fi;
       MEMBER(peer) = process_of[peer];
       if
       :: MEMBER(peer) != NOBODY ->
          if
          :: member_count[u] == 0 -> hub[u] = MEMBER(peer)
          :: else
          fi;
          member_count[u]++
       :: else
       fi;
       peer++
    :: else -> break
    od;
    peer = 0
}

/* Those that live are named when the first of them begins; `came` says whether this one is. */
inline begin_update() {
    atomic {
        u = updates[self] + 1;
        updates[self] = u;
        if
        :: member_count[u] == 0 && !lost[self] -> name_members()
        :: else
        fi;
        came = (member_count[u] > 0 && MEMBER(me) == self)
    }
}

/* Some will not come, or a deadline is spent on one that is slow. */
#define GIVE_UP(is_known)    \
    if                       \
    :: is_known              \
    :: else -> timeouts--    \
    fi;                      \
    left[u] = true;          \
    came = false

/* An all-gather: until this process knows that all have come to the k-th; else `came` is false. */
#define SOME_LEFT (left[u] || ANY(IS_LOST))
#define ALL_ARRIVED(k) (arrived[u] == (k) * member_count[u])
#if !defined(STAR)
inline gather(k) {
    STEP;
    arrived[u]++;
    if
    :: atomic { passed[u] >= k -> came = true }
    :: atomic { passed[u] < k && !left[u] && ALL_ARRIVED(k) -> passed[u] = k; came = true }
    :: atomic { passed[u] < k && (left[u] || !ALL_ARRIVED(k)) && (SOME_LEFT || timeouts > 0) ->
                GIVE_UP(SOME_LEFT) }
    fi
}
#else
inline answer(k) {
    peer = 0;
    do
    :: peer < R ->
       if
       :: MEMBER(peer) != NOBODY && peer != me ->
          STEP;
          answered[u * R + peer] = k;
#if defined(BUG_FAILS_UNHEARD)
          if
          :: lost[MEMBER(peer)] -> came = false
          :: true
          fi
#endif
       :: else
       fi;
       peer++
    :: else -> break
    od;
    peer = 0
}

#define HUB_LEFT (kept[u * P + hub[u]] || lost[hub[u]])
inline gather(k) {
    STEP;
    arrived[u]++;
    if
    :: hub[u] == self ->
       if
       :: atomic { ALL_ARRIVED(k) -> came = true }
       :: atomic { !ALL_ARRIVED(k) && (SOME_LEFT || timeouts > 0) -> GIVE_UP(SOME_LEFT) }
       fi;
       if
       :: came -> answer(k)
       :: else
       fi
    :: else ->
       if
       :: atomic { answered[u * R + me] >= k -> came = true }
       :: atomic { answered[u * R + me] < k && (HUB_LEFT || timeouts > 0) ->
                   GIVE_UP(HUB_LEFT) }
       fi
    fi
}
#endif

/* The first to write the word decides for all. */
inline decide() {
    atomic {
        if
        :: decided[u] == UNDECIDED -> decided[u] = (came -> COMPLETE : INCOMPLETE)
        :: else
        fi;
        came = (decided[u] == COMPLETE)
    }
}

/* Of this rank's window; only planted bugs need it, for all other memory is zero. */
#define CLEAR(memory)                                                          \
    peer = 0;                                                                  \
    do                                                                         \
    :: peer < R * S -> flag[((memory) * R + me) * R * S + peer] = 0; peer++    \
    :: else -> break                                                           \
    od;                                                                        \
    peer = 0

inline allocate() {
    d_step {
#if defined(BUG_REUSES_OLD)
        memory[u * R + me] = u % 2;
        CLEAR(u % 2);
#elif defined(BUG_REUSES_NEW)
        memory[u * R + me] = (u > 1 && kept[(u - 1) * P + self] -> memory[(u - 1) * R + me] : u);
        CLEAR(memory[u * R + me]);
#endif
        highest[u] = (sent > highest[u] -> sent : highest[u])
    }
}

/* A step may fail, and the process says so. */
#define FAULT                                                           \
    if                                                                  \
    :: atomic { faults > 0 -> faults--; left[u] = true; came = false }  \
    :: true                                                             \
    fi

/* Members are unmasked, all others masked: nothing of theirs is mapped. */
#if defined(BUG_KEEPS_MASKS)
#define NEW_MASK(peer) (MASKED(me, peer) -> FORGOTTEN : 0)
#elif defined(BUG_OTHERS_ACTIVE)
#define NEW_MASK(peer) (MEMBER(peer) == NOBODY -> MASKED(me, peer) : 0)
#else
#define NEW_MASK(peer) (MEMBER(peer) == NOBODY)
#endif
inline switch_windows() {
    d_step {
        peer = 0;
        do
        :: peer < R -> masked[(u * P + self) * R + peer] = NEW_MASK(peer); peer++
        :: else -> break
        od;
#if defined(BUG_CLEARS_LATE)
        CLEAR(u);
#endif
        g = u;
        generation[self] = u;
#if defined(BUG_RESTARTS)
        sent = 0;
#elif !defined(BUG_OWN_EPOCHS)
        sent = highest[u];
#endif
#if !defined(BUG_IN_FLIGHT)
        oldest = sent + 1;
#endif
        peer = 0
    }
}

/* Whether this process goes on in new windows: `came`. */
inline update() {
    begin_update();
    if
    :: came -> gather(1)  /* they meet */
    :: else
    fi;
    if
    :: came -> FAULT; allocate()
    :: else
    fi;
    if
    :: came -> gather(2)  /* tells where the windows are, and epochs */
    :: else
    fi;
    if
    :: came ->
#if defined(BUG_UNMASKS_EARLY)
       d_step { MASKED(me, 0) = 0; MASKED(me, 1) = 0; MASKED(me, R - 1) = 0 };
#endif
       FAULT  /* maps them */
    :: else
    fi;
#if !defined(BUG_NO_LAST)
    if
    :: came ->
       gather(3);
#if defined(ONE_WORD)
       STEP;
       decide()
#endif
    :: else
    fi;
#endif
    STEP;
    if
    :: came -> switch_windows()
    :: else -> kept[u * P + self] = true
    fi
}

proctype Process(byte self, me) {
    byte g = 0, u = 0, sent = 0, oldest = 1, last = BEFORE;
    bool received[N + 2];
    byte peer = 0, m = 0;
    bool came = false;
    do
    :: true ->
       if
       :: self < R || g > 0 -> rounds(last)
       :: else  /* a new process that has not got in */
       fi;
       if
       :: updates[self] == UPDATES -> break
       :: else
       fi;
       update();
       if
       :: !came && lost[self] -> break  /* all have masked it, and no update will name it */
       :: else
       fi;
       last = sent + AFTER
    od;
gone:
    skip
}

init {
    byte me = 0;
    atomic {
        do
        :: me < R -> process_of[me] = me; named[me] = me; run Process(me, me); me++
        :: else -> break
        od
    }
}

/*
 * Rounds of dispatch or combine through slots that are used again: a model for spin. What is in it
 * and what is not, and how to run it: README.md here. ARCHITECTURE.md, Reuse of slots, has the
 * argument in words.
 *
 *   R  ranks; F  rounds in flight; N  rounds, enough that each slot is used twice and more
 *   SOME_TOKENS  whether there is a message is open for each round and pair (combine); otherwise
 *                there always is one (dispatch, where a rank without tokens gets an empty one)
 *   CRASHES      so many ranks may stop for ever, at any step
 *   TIMEOUTS     so many waits may end although the peer is only slow
 *   NAMES_ANEW   each round a caller names all ranks as active, whoever was masked before; any wait
 *                may end although the peer is only slow
 *   BUG_...      what is planted, and has to be found
 */
#if defined(BUG_FEW_SLOTS)
#define S (2 * F - 1)
#else
#define S (2 * F)
#endif
#if defined(BUG_WIDE_WINDOW)
#define WINDOW (F + 1)
#else
#define WINDOW F
#endif

/* In the window of `owner`: of each source and slot, the last round of which it has the word. */
#define PLACE(owner, source, m) (((owner) * R + (source)) * S + (m) % S)
byte begun[R * R * S];    /* the count or the arrival */
byte payload[R * R * S];
byte flag[R * R * S];
bool masked[R * R];       /* [me][peer] */
bool dead[R];
bool token[R * R * (N + 1)];  /* [from][to][round] */
byte crashes = CRASHES, timeouts = TIMEOUTS;

#define MASKED(me, peer) masked[(me) * R + (peer)]
#define TOKEN(from, to, m) token[((from) * R + (to)) * (N + 1) + (m)]

/* A rank may be gone before any step. */
#define STEP                                                   \
    if                                                         \
    :: atomic { crashes > 0 -> crashes--; dead[me] = true };   \
       goto gone                                               \
    :: true                                                    \
    fi

/* A rank that was masked may be many rounds behind. It is stored to if it has begun the round in
 * the middle between this and the last one of the slot, as a word of its own says. */
#if defined(NAMES_ANEW)
byte last_begun[R];
#define BEGIN(m)                                              \
    d_step {                                                  \
        last_begun[me] = m;                                   \
        peer = 0;                                             \
        do                                                    \
        :: peer < R -> MASKED(me, peer) = false; peer++       \
        :: else -> break                                      \
        od;                                                   \
        peer = 0                                              \
    }
#define MISSED(peer) true
#if defined(BUG_STORES_EARLY)
#define MAY_STORE(peer, m) (last_begun[peer] + F + 1 >= m)
#elif !defined(BUG_STORES_BLINDLY)
#define MAY_STORE(peer, m) (last_begun[peer] + F >= m)
#endif
#endif

/* Who is dead, or has masked me, never comes. */
#define EXCUSED(peer) (dead[peer] || MASKED(peer, me))
#define SENT(m) (m)
#define WHOLE(peer, m) (m)
#include "steps.pml"

proctype Rank(byte me) {
    byte sent = 0, oldest = 1;
    bool received[N + 2];
    byte peer = 0, m = 0;
    bool came = false;
    rounds(N);
gone:
    skip
}

init {
    byte from = 0, to = 0, m = 1, me = 0;
    atomic {
#if defined(SOME_TOKENS)
        do
        :: from < R ->
           do
           :: to < R ->
              do
              :: m <= N ->
                 if
                 :: from != to -> TOKEN(from, to, m) = true
                 :: true
                 fi;
                 m++
              :: else -> break
              od;
              m = 1;
              to++
           :: else -> break
           od;
           to = 0;
           from++
        :: else -> break
        od;
#else
        do
        :: m < R * R * (N + 1) -> token[m] = true; m++
        :: else -> break
        od;
        token[0] = true;
#endif
        from = 0;
        m = 0;
        do
        :: me < R -> run Rank(me); me++
        :: else -> break
        od
    }
}

/*
 * What a rank does in its rounds, for the models that include this file. They say before what a
 * place, a mask, a loss and a message are:
 *
 *   PLACE(owner, source, m)  where in the windows `owner` has what `source` sends in round m
 *   MASKED(me, peer)         a word that is set when a peer is masked
 *   EXCUSED(peer)            `peer` will not send this, so that a deadline passes; others have
 *                            `timeouts` for being only slow
 *   STEP                     a rank may be lost here
 *   TOKEN(from, to, m)       there is a message
 *   SENT(m), WHOLE(peer, m)  the bytes of a message, here and as they should come from a peer
 *   WINDOW, N, LEAVES        rounds in flight; rounds; if defined, when to stop before the last
 *   NO_BEGIN_WORDS           if there always is a message, these say nothing that its flag does not
 *
 * and may say
 *
 *   BEGIN(m)                 what else happens when a round begins
 *   MISSED(peer)             whether a wait may end
 *   MAY_STORE(peer, m)       whether a message may be stored where one of an older round is
 */
#if !defined(BEGIN)
#define BEGIN(m) skip
#endif
#if !defined(MAY_STORE)
#define MAY_STORE(peer, m) true
#endif
#if defined(MISSED)
#elif defined(BUG_NO_DEADLINE)
#define MISSED(peer) false
#else
#define MISSED(peer) (EXCUSED(peer) || timeouts > 0)
#endif

/* Until the condition holds; false in `came` if the peer is masked, or missed the deadline. */
#define AWAIT(condition, peer)                                                        \
    if                                                                                \
    :: atomic { MASKED(me, peer) -> came = false }                                    \
    :: atomic { !MASKED(me, peer) && (condition) -> came = true }                     \
    :: atomic { !MASKED(me, peer) && !(condition) && MISSED(peer) ->                  \
                if                                                                    \
                :: EXCUSED(peer)                                                      \
                :: !EXCUSED(peer) && timeouts > 0 -> timeouts--                       \
                :: else                                                               \
                fi;                                                                   \
                MASKED(me, peer) = true;                                              \
                came = false }                                                        \
    fi

#if defined(BUG_ANY_EPOCH)
#define IS_OF(word, m) ((word) != 0)
#else
#define IS_OF(word, m) ((word) == (m))
#endif
#if defined(BUG_SENDS_TO_MASKED)
#define SENDS_TO(peer) (peer != me)
#else
#define SENDS_TO(peer) (peer != me && !MASKED(me, peer))
#endif

inline send(m) {
    BEGIN(m);
#if !defined(NO_BEGIN_WORDS)
    peer = 0;
    do
    :: peer < R ->
       STEP;
       if
       :: SENDS_TO(peer) -> begun[PLACE(peer, me, m)] = m
       :: else
       fi;
       peer++
    :: else -> break
    od;
#endif
    peer = 0;
    do
    :: peer < R ->
       if
       :: SENDS_TO(peer) && TOKEN(me, peer, m) && MAY_STORE(peer, m) ->
#if defined(BUG_FLAG_FIRST)
          flag[PLACE(peer, me, m)] = m;
          STEP;
          payload[PLACE(peer, me, m)] = SENT(m)
#else
          payload[PLACE(peer, me, m)] = SENT(m);
          STEP;
          flag[PLACE(peer, me, m)] = m
#endif
       :: else
       fi;
       peer++
    :: else -> break
    od;
    peer = 0
}

inline receive(m) {
    peer = 0;
    do
    :: peer < R && peer != me ->
       STEP;
       came = true;
#if !defined(BUG_NO_BEGIN) && !defined(NO_BEGIN_WORDS)
       AWAIT(IS_OF(begun[PLACE(me, peer, m)], m), peer);
#endif
       if
       :: came && TOKEN(peer, me, m) ->
          AWAIT(IS_OF(flag[PLACE(me, peer, m)], m), peer);
          if
          :: came -> assert(payload[PLACE(me, peer, m)] == WHOLE(peer, m))
          :: else
          fi
       :: else
       fi;
       peer++
    :: peer == me -> peer++
    :: peer >= R -> break
    od;
    peer = 0;
    came = false
}

/* Sends the rounds up to `last`, and receives all, any of those in flight first. `oldest` is the
 * first that is not received. */
inline rounds(last) {
    do
    :: sent < last && sent + 1 < oldest + WINDOW ->
       send(sent + 1);
       sent++
    :: oldest <= sent ->
       m = oldest;
       do
       :: m < sent -> m++
       :: m == sent && received[m] -> m = oldest
       :: !received[m] -> break
       od;
       receive(m);
       received[m] = true;
       m = 0;
       do
       :: oldest <= N && received[oldest] -> received[oldest] = false; oldest++
       :: else -> break
       od
    :: oldest > last -> break
#if defined(LEAVES)
    :: LEAVES -> break
#endif
    od
}

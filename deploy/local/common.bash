# What `up` and `down` share: where the state lies, and when a recorded process is still ours. Sourced, not run.

state=${VGGROW_LOCAL:-${XDG_STATE_HOME:-$HOME/.local/state}/vggrow-local}
case $state in /*) ;; *) state=$PWD/$state ;; esac
services="timetable mlflow ray"      # the order in which they end: those that use others first

say() { printf '%s\n' "$*" >&2; }
give_up() { say "error: $*"; exit 2; }

# One `up` or `down` at a time. A server that is being started holds the lock too, until its pid is on disk: so whoever
# gets the lock after a killed `up` knows every process there is.
take_lock() {
    mkdir -p "$state"
    chmod 700 "$state"
    exec 9>"$state/lock"
    flock --timeout 120 9 || give_up "$state/lock: another up or down has held it for 120 s; wait for it, or end it"
}

# Field 22 of /proc/PID/stat: when the process began, in clock ticks. A pid is used again one day; the pair is not. Nothing
# for one that has died and whose parent has not reaped it (Z, X).
began() { sed -n 's/.*) \([^ZX] \)/\1/p' "/proc/$1/stat" 2> /dev/null | cut -d ' ' -f 20; }

# The leader of service $1, if it is the process that was recorded and lives.
leader() {
    local pid start
    { read -r pid start < "$state/$1.pid"; } 2> /dev/null || return 1
    [ -n "$start" ] && [ "$(began "$pid")" = "$start" ] && printf '%s\n' "$pid"
}

# Every live process of service $1: those in its leader's session, and those (Ray's workers begin sessions of their own)
# that inherited its mark. The mark is random, made anew for each start, so that nobody else's process can carry it.
members() {
    local mark environ
    mark=$(cat "$state/$1.mark" 2> /dev/null) || return 0
    for environ in /proc/[0-9]*/environ; do
        if grep -qzxF "VGGROW_LOCAL_MARK=$mark" "$environ" 2> /dev/null; then
            environ=${environ#/proc/}
            printf '%s\n' "${environ%/environ}"
        fi
    done
}

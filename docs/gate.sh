#!/bin/sh
# A gate that fails for new reasons only, from end to end. Run it with the packages of two releases:
#
#   docs/gate.sh DIRECTORY
#
# DIRECTORY holds base.deb (the C library), old.deb and new.deb (two builds of one package). The working directory gets
# baseline.json and forkproof.toml. It prints the exit code of each step.
set -u
dir=$1
scan() { forkproof scan --quiet "$@" "$dir/base.deb"; echo "exit $?"; }

echo '== 1. accept what is there today'
scan "$dir/old.deb" --format json --fail-on never --output baseline.json

echo '== 2. nothing new: the gate is open'
scan "$dir/old.deb" --baseline baseline.json | tail -n 1

echo '== 3. the upgrade introduces a hazard: the gate is shut'
scan "$dir/new.deb" --baseline baseline.json | grep -E '^exit|^(HIGH|MEDIUM).*new'

echo '== 4. known upstream, suppressed until a day'
cat > forkproof.toml <<'END'
[[suppress]]
target = "daemon"
object = "liballoc_spin.so"
reason = "reported upstream; the next release registers its handlers"
expires = 2027-03-01
END
export SOURCE_DATE_EPOCH=1801440000 # 1 February 2027
scan "$dir/new.deb" --baseline baseline.json | tail -n 1

echo '== 5. the day has passed: the gate is shut again, and says why'
export SOURCE_DATE_EPOCH=1803945600 # 2 March 2027
scan "$dir/new.deb" --baseline baseline.json | grep -E '^exit|expired'

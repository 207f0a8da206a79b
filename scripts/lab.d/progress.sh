# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# A plan of steps with an overall estimate. Each step brings the seconds it took on the machine the weights were
# measured on and, where its log grows evenly, the number of lines the log ends with. As steps finish, the ratio
# of real to expected time becomes known, and the rest of the plan is scaled by it.

declare -a STEP_NAME=() STEP_FN=() STEP_SECONDS=() STEP_LINES=()
PLAN_SPENT=0     # seconds that finished steps took
PLAN_EXPECTED=0  # seconds that they were expected to take

# step NAME FUNCTION SECONDS LINES: add to the plan. LINES 0 means that progress is told by time alone; instead of a
# number it may be a function that reads progress, in thousandths, from the log it is given.
step() {
	STEP_NAME+=("$1") STEP_FN+=("$2") STEP_SECONDS+=("$3") STEP_LINES+=("$4")
}

clock() {
	local s=$1
	if [ "$s" -ge 60 ]; then printf '%dm%02ds' $((s / 60)) $((s % 60)); else printf '%ds' "$s"; fi
}

# scaled SECONDS: what SECONDS of the plan are likely to take here.
scaled() {
	if [ "$PLAN_EXPECTED" -ge 10 ]; then echo $(($1 * PLAN_SPENT / PLAN_EXPECTED)); else echo "$1"; fi
}

# step_permille INDEX ELAPSED LOG: how far a running step is. Never quite done: only its end says that.
step_permille() {
	local done_ expected lines
	if [[ ${STEP_LINES[$1]} != [0-9]* ]]; then
		done_=$("${STEP_LINES[$1]}" "$3")
	elif [ "${STEP_LINES[$1]}" -gt 0 ]; then
		lines=$(wc -l <"$3")
		done_=$((lines * 1000 / STEP_LINES[$1]))
	else
		expected=$(scaled "${STEP_SECONDS[$1]}")
		done_=$(($2 * 1000 / (expected + 1)))
		# Past its time, a step creeps towards the end.
		[ "$done_" -le 900 ] || done_=$((1000 - 100000 / (done_ + 100)))
	fi
	[ "$done_" -le 990 ] || done_=990
	echo "$done_"
}

# plan_eta INDEX ELAPSED PERMILLE: seconds until the whole plan is done.
plan_eta() {
	local i rest=0 own left
	for ((i = $1 + 1; i < ${#STEP_NAME[@]}; i++)); do rest=$((rest + STEP_SECONDS[i])); done
	own=$(scaled "${STEP_SECONDS[$1]}")
	left=$((own - $2))
	# Once a good part is behind, the step's own pace knows better than the plan.
	if [ "$3" -ge 200 ]; then left=$(($2 * (1000 - $3) / $3)); fi
	[ "$left" -ge 1 ] || left=1
	echo $((left + $(scaled "$rest")))
}

# draw INDEX ELAPSED LOG: the progress bar, over the previous one.
draw() {
	local i total=0 before=0 permille width=28 filled bar
	permille=$(step_permille "$1" "$2" "$3")
	for i in "${!STEP_SECONDS[@]}"; do
		total=$((total + STEP_SECONDS[i]))
		[ "$i" -ge "$1" ] || before=$((before + STEP_SECONDS[i]))
	done
	filled=$(((before * 1000 + STEP_SECONDS[$1] * permille) / total))
	printf -v bar '%*s' $((filled * width / 1000)) ''
	printf '\r\033[K[%-*s] %2d%%  %d/%d %s  %s left' "$width" "${bar// /#}" $((filled / 10)) \
		$(($1 + 1)) ${#STEP_NAME[@]} "${STEP_NAME[$1]}" "about $(clock "$(plan_eta "$1" "$2" "$permille")")"
}

# step_failed INDEX LOG: a cause that we worded ourselves says more than the lines before it; else the last lines have to do.
step_failed() {
	printf 'lab: error: %s failed\n' "${STEP_NAME[$1]}"
	if grep -q '^lab: error: ' -- "$2"; then
		tac -- "$2" | sed '/^lab: error: /q' | tac
	else
		# With several jobs make goes on for a while after the one that failed.
		if grep -q '^make.*\*\*\* .* Error ' -- "$2"; then
			printf '     The first error:\n'
			grep -m 1 -B 8 '^make.*\*\*\* .* Error ' -- "$2" | sed 's/^/  | /'
		fi
		printf '     Its last lines were:\n'
		tail -n 15 -- "$2" | sed 's/^/  | /'
	fi
	printf '     The whole log: %s\n     Run the same command again to continue from here.\n' "$2"
}

# run_plan: run the steps in turn; each one's output goes to its log. The first failure ends the plan.
run_plan() {
	local i log started elapsed said status tty=
	[ ! -t 1 ] || tty=1
	mkdir -p -- "$LOGS"
	for i in "${!STEP_NAME[@]}"; do
		log=$LOGS/${STEP_NAME[$i]// /-}.log
		: >"$log"
		started=$SECONDS said=$SECONDS
		[ -n "$tty" ] || say "lab: [$((i + 1))/${#STEP_NAME[@]}] ${STEP_NAME[$i]}, about $(clock "$(plan_eta "$i" 0 0)") left"
		# A step is a subshell with errexit of its own: not in a condition, or bash would switch errexit off in it.
		(set -e; "${STEP_FN[$i]}") >"$log" 2>&1 </dev/null &
		while kill -0 $! 2>/dev/null; do
			elapsed=$((SECONDS - started))
			if [ -n "$tty" ]; then
				draw "$i" "$elapsed" "$log"
			elif [ $((SECONDS - said)) -ge 60 ]; then
				said=$SECONDS
				say "lab: [$((i + 1))/${#STEP_NAME[@]}] ${STEP_NAME[$i]}, about $(clock \
					"$(plan_eta "$i" "$elapsed" "$(step_permille "$i" "$elapsed" "$log")")") left"
			fi
			sleep 0.3
		done
		status=0
		wait $! || status=$?
		elapsed=$((SECONDS - started))
		[ -z "$tty" ] || printf '\r\033[K'
		if [ "$status" -ne 0 ]; then
			step_failed "$i" "$log" >&2
			return 1
		fi
		say "lab: [$((i + 1))/${#STEP_NAME[@]}] ${STEP_NAME[$i]}: done in $(clock "$elapsed")"
		PLAN_SPENT=$((PLAN_SPENT + elapsed))
		PLAN_EXPECTED=$((PLAN_EXPECTED + STEP_SECONDS[i]))
	done
}

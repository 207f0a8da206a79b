// SPDX-License-Identifier: GPL-2.0
//
// The profiler's hooks into the emulator (its BX_INSTR_ interface). instrument.cc says what
// they are for; everything not wanted is empty, so that the instrumented build stays usable.

#if BX_INSTRUMENTATION

class bxInstruction_c;

#define BX_INSTR_IS_CALL_KIND(what) ((what) == BX_INSTR_IS_CALL || (what) == BX_INSTR_IS_CALL_INDIRECT)

extern bool matryoshka_profile_on;

void bx_instr_profile(unsigned cpu, bool on);
void matryoshka_instruction(unsigned cpu);
void matryoshka_branch(unsigned cpu, unsigned what, bx_address from, bx_address to);
void matryoshka_event(unsigned cpu, unsigned vector);
void matryoshka_vmexit(unsigned cpu, Bit32u reason);

#define BX_INSTR_INIT_ENV()
#define BX_INSTR_EXIT_ENV()
#define BX_INSTR_INITIALIZE(cpu_id)
#define BX_INSTR_EXIT(cpu_id)
#define BX_INSTR_RESET(cpu_id, type)
#define BX_INSTR_HLT(cpu_id)
#define BX_INSTR_MWAIT(cpu_id, addr, len, flags)
#define BX_INSTR_DEBUG_PROMPT()
#define BX_INSTR_DEBUG_CMD(cmd)
#define BX_INSTR_CNEAR_BRANCH_TAKEN(cpu_id, branch_eip, new_eip)
#define BX_INSTR_CNEAR_BRANCH_NOT_TAKEN(cpu_id, branch_eip)
#define BX_INSTR_UCNEAR_BRANCH(cpu_id, what, branch_eip, new_eip) matryoshka_branch(cpu_id, what, branch_eip, new_eip)
#define BX_INSTR_FAR_BRANCH(cpu_id, what, prev_cs, prev_eip, new_cs, new_eip)
#define BX_INSTR_OPCODE(cpu_id, i, opcode, len, is32, is64)
#define BX_INSTR_EXCEPTION(cpu_id, vector, error_code)
#define BX_INSTR_INTERRUPT(cpu_id, vector) matryoshka_event(cpu_id, vector)
#define BX_INSTR_HWINTERRUPT(cpu_id, vector, cs, eip)
#define BX_INSTR_CLFLUSH(cpu_id, laddr, paddr)
#define BX_INSTR_CACHE_CNTRL(cpu_id, what)
#define BX_INSTR_TLB_CNTRL(cpu_id, what, new_cr3)
#define BX_INSTR_PREFETCH_HINT(cpu_id, what, seg, offset)
#define BX_INSTR_BEFORE_EXECUTION(cpu_id, i) { if (matryoshka_profile_on) matryoshka_instruction(cpu_id); }
#define BX_INSTR_AFTER_EXECUTION(cpu_id, i)
#define BX_INSTR_REPEAT_ITERATION(cpu_id, i)
#define BX_INSTR_LIN_ACCESS(cpu_id, lin, phy, len, memtype, rw)
#define BX_INSTR_PHY_ACCESS(cpu_id, phy, len, memtype, rw)
#define BX_INSTR_INP(addr, len)
#define BX_INSTR_INP2(addr, len, val)
#define BX_INSTR_OUTP(addr, len, val)
#define BX_INSTR_WRMSR(cpu_id, addr, value)
#define BX_INSTR_VMEXIT(cpu_id, reason, qualification) matryoshka_vmexit(cpu_id, reason)

#else

#error "this directory is for an instrumented build"

#endif

"""Calls through, or with, a register that was set somewhere before in the function.

Owns: following a word from where it is loaded to the calls that are made through it: compilers load the address of a
      function once that they call several times without a PLT (`mov fork@GOT(%rip), %r14; ...; call *%r14`). And an
      address to the calls that pass it: one that is passed several times is formed once.
Takes: a decoded function, addresses of words and functions, sites of calls. Gives: sites of calls, each with the
      one that it goes through, or the address that it passes.
Must never: name a call through a register that holds something else on another way.
Wrong where: the register is kept in memory other than the stack in between.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from forkproof.code.decode import Body
from forkproof.code.explore import explore
from forkproof.code.operations import Call, JumpUnknown, Register
from forkproof.code.values import Word
from forkproof.elf.image import Machine


def calls_through(body: Body, machine: Machine, words: Container[int]) -> Iterator[tuple[int, int]]:
    """(site, word) of the calls and tail calls that go to what one of these words holds, or to one itself."""
    registers = {
        instruction.address: operation.through.name
        for instruction in body.instructions
        for operation in instruction.operations
        if isinstance(operation, Call | JumpUnknown) and isinstance(operation.through, Register)
    }
    if not registers:
        return
    states = explore(body, machine, body.entry, watch=registers, within=body.leading_to(registers)).states
    for site, register in sorted(registers.items()):
        value = states[site].register(register) if site in states else None
        if value is None:
            continue
        if value.base is None and value.offset in words:
            yield site, value.offset
        elif isinstance(value.base, Word) and value.offset == 0 and value.base.address in words:
            yield site, value.base.address


def arguments_at(body: Body, machine: Machine, sites: Container[int], register: str) -> Iterator[tuple[int, int]]:
    """(site, address) of those calls at these sites at which a register holds an address that is known."""
    calls = [i.address for i in body.instructions if i.address in sites]
    states = explore(body, machine, body.entry, watch=calls, within=body.leading_to(calls)).states if calls else {}
    for site in calls:
        value = states[site].register(register) if site in states else None
        if value is not None and value.base is None:
            yield site, value.offset

"""Imported before all else: as the command itself, Ctrl-C is heard from here on."""

from twinmoe.oracle.interrupts import end_in_one_line, is_program

if is_program():
    end_in_one_line()

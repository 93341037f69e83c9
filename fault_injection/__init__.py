# SPDX-License-Identifier: MIT
"""The fault campaign: recorded jobs, spoilt in many ways, through the real stages, held against the trainer's own word.

`jobs` records and reads the truth, `kinds` spoils, `chain` and `processes` run the stages, `judge` compares, `campaign` spreads the cases
over processes, `page` draws. `flowcheck faults` is the command; docs/reliability.md says what is promised.
"""

__all__: list[str] = []

"""Harnesses that take long, as commands with an end.

python -m tests.soak kills --count 200     SIGKILL while exports are saved and while the long commands run
python -m tests.soak server                one good client of the policy server beside each attack
"""

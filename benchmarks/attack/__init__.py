"""Attacks on a real server process over loopback: it must live, keep its sessions, stay within its memory and its pace.

`runner` runs them and judges; every other module holds the attacks of one family.
"""

"""One engine on the devices of several processes: process 0 serves, the others run the same programs in the same order.

A program over devices of several processes has to be launched by all of them, in one order and with the same host inputs.
So every call that process 0's scheduler makes of its `ModelRunner` is written into a log, which goes to the others over TCP
before the call is made (`leader`); they make the same calls of runners of their own (`follower`). What a call leaves on the
devices is named by a number, so that no state is sent. What the host reads, the output of a step, is whole on every device.
"""

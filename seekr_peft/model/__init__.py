"""One model: which kinds can be trained, its answers, its adapters, and what they need of bitsandbytes and the device.

A base is checked by ``base_files`` and ``kind``, gets its adapters from ``adapter_stack`` and answers through
``answers``.
"""

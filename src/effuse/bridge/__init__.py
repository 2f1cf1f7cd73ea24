"""Diffusers in, schedulers and saved folders out.

This file stays empty of imports: `import effuse` passes through it. Import from the modules.
"""

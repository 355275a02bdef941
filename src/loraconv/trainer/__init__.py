"""Training of CogVideoX transformers: the parts of ``loraconv train``. Nothing else of loraconv imports this
package."""
